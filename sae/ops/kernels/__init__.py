"""Triton kernels for what `sae.ops.bags` does in torch; they need a GPU, or Triton's interpreter."""

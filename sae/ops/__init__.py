"""Pure tensor functions: sparse encode and decode with their gradients, metrics, pursuit."""

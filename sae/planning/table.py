"""A plan as text: sizes that are counted, and times that rest on stated assumptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.files import format_bytes
from sae.planning.speed import LINKS, PEAKS, SHARES, format_seconds, spans

if TYPE_CHECKING:
    from sae.planning.plan import RunPlan


def plan_table(plan: RunPlan) -> str:
    """What to print for a plan, about twenty-five lines."""
    return "\n".join([_title(plan), *_memory(plan), *_disk(plan), *_communication(plan), *_time(plan)])


def _title(plan: RunPlan) -> str:
    step = plan.step
    where = "this machine's processor" if plan.on_processor else f"{plan.gpus} GPU{'s' * (plan.gpus > 1)}"
    rows = f"{step.rows:,} rows a step" + (f" on each of {plan.gpus}" if plan.gpus > 1 else "")
    kinds = [f"{type(d).__name__}({d.extra_repr()})" for d in plan.dictionaries.values()]
    if len(kinds) == 1:
        return f"{kinds[0]} on {where}: {rows}, {step.precision}"
    lines = [f"  {name:<18}{kind}" for name, kind in zip(plan.dictionaries, kinds, strict=True)]
    return "\n".join([f"{len(kinds)} dictionaries on {where}: {rows}, {step.precision}", *lines])


def _memory(plan: RunPlan) -> list[str]:
    memory, limit = plan.memory, plan.memory_limit
    if limit is None:
        bound = "not compared: give a GPU's memory as --plan.memory 80GB"
    else:
        of = "that this machine has" if plan.on_processor else "of each GPU"
        bound = f"of the {format_bytes(limit)} {of}; the runtime takes about 1 GB more"
    auxk = (
        ", all latents being dead"
        if any(step.revived for step in plan.each) and "pass" in memory.peak_at
        else ""
    )
    lines = [
        "memory per GPU" if not plan.on_processor else "memory",
        _line("parameters", memory.parameters),
        _line("gradients", memory.gradients),
        _line("moments", memory.moments, "Adam's two"),
        _line("activations", memory.activations, f"at the peak, {memory.peak_at}{auxk}"),
    ]
    if plan.language_model_bytes:
        lines.append(_line("language model", plan.language_model_bytes, "it harvests beside the training"))
    lines.append(_line("total", plan.total_memory, bound))
    ahead = plan.batches_ahead * plan.step.rows * plan.step.d_model * plan.step.row_element
    if ahead:
        lines.append(_line("batches ahead", ahead, "beside the total, in the memory of the machine"))
    return lines


def _disk(plan: RunPlan) -> list[str]:
    cache, room = plan.cache, plan.run_folder.free_bytes()
    whole = f"of {format_bytes(cache.total_bytes)}"
    rows = f"{cache.rows:,} rows" + (", shards coming and going" if cache.is_rolling else "")
    return [
        "disk",
        _line("cache to come", cache.bytes_to_come, f"{whole}: {rows}; {_free(cache.free_bytes)}"),
        f"  {'in':<18}{cache.place}",
        _line("checkpoints", plan.checkpoint_bytes, f"last, previous and best; {_free(room)}"),
        f"  {'in':<18}{plan.run_folder}",
    ]


def _free(n_bytes: int | None) -> str:
    return "no limit known" if n_bytes is None else f"{format_bytes(n_bytes)} free"


def _communication(plan: RunPlan) -> list[str]:
    if plan.gpus == 1:
        return ["communication: none, with one GPU"]
    links = [
        f"about {format_seconds(plan.sent_bytes / rate)} over {name} ({format_bytes(int(rate))}/s assumed)"
        for name, rate in LINKS.items()
    ]
    return [
        "communication per step",
        _line("sent by each GPU", plan.sent_bytes, "gradients, summed around a ring"),
        f"  {', '.join(links)}",
    ]


def _time(plan: RunPlan) -> list[str]:
    low, high = SHARES
    found = spans(plan.work, plan.gpus, measure=plan.on_processor)
    tokens = f"{plan.cache.tokens_to_run:,} tokens and train on {plan.tokens:,} ({plan.steps:,} steps)"
    lines = [
        f"time to harvest {tokens}",
        f"  {'':<18}{'harvest':<22}training",
    ]
    for name, (harvest, train) in found.items():
        label = f"{plan.gpus} x {name}" if name in PEAKS else name
        done = "nothing to do" if harvest is None else str(harvest)
        lines.append(f"  {label:<18}{done:<22}{train}")
    lines.append(
        f"  assumed: {low:.0%} to {high:.0%} of the data sheets' dense peak. Tokenising, waiting for"
    )
    lines.append("  disks, validation and baselines are not counted.")
    return lines


def _line(name: str, n_bytes: int, note: str = "") -> str:
    return f"  {name:<18}{format_bytes(n_bytes):>9}  {note}".rstrip()

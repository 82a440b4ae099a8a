"""The figures as text."""

from __future__ import annotations

from typing import Any


def print_steps(figures: dict[str, Any]) -> None:
    """One case: a line for each contender, then memory and stages."""
    print(f"\n{figures['case']}")
    print(f"  {'':<20} {'tokens/s':>12} {'ms/step':>10} {'time / ours':>12} {'range':>16}")
    for name, found in figures["contenders"].items():
        over = found["time over ours"]
        print(
            f"  {name:<20} {found['tokens per s']:>12,.0f} {found['ms per step']:>10.2f}"
            f" {over['median']:>12.2f} {over['lowest']:>8.2f} to {over['highest']:.2f}"
        )
    stages = ", ".join(f"{stage} {share:.0%}" for stage, share in figures["stages"].items())
    print(f"  time: {stages}")
    key = next(key for key in figures if key.startswith("peak"))
    print(f"  {key}: {figures[key]:.2f}")


def print_figures(title: str, figures: dict[str, Any]) -> None:
    """A line for each number or each median with its range."""
    if figures:
        print(f"\n{title}")
    for name, value in figures.items():
        ratios = [v for v in value.values() if isinstance(v, dict)] if isinstance(value, dict) else []
        found = ratios[0] if ratios else value
        if isinstance(found, dict):
            print(f"  {name:<76} {found['median']:8.3f}   {found['lowest']:.3f} to {found['highest']:.3f}")
        else:
            print(f"  {name:<76} {found:8.3f}")

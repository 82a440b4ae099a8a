"""Plan before you pay: what a run takes, before it is started."""

from sae.planning.memory import Memory, Step, memory_of
from sae.planning.plan import RunPlan, plan_run

__all__ = ["Memory", "RunPlan", "Step", "memory_of", "plan_run"]

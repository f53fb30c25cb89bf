"""Every fused op and its reference; importable from other projects as torch.ops.fastlatent.* too."""

from fastlatent.ops.gather_rows import ShardTable, gather_rows, gather_rows_reference
from fastlatent.ops.solver_step import solver_step, solver_step_reference

__all__ = ["ShardTable", "gather_rows", "gather_rows_reference", "solver_step", "solver_step_reference"]

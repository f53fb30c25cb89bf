"""Every fused op and its reference; importable from other projects as torch.ops.fastlatent.* too."""

from fastlatent.ops.decode_attention import decode_attention, decode_attention_reference
from fastlatent.ops.diffusion_head_sample import HeadWeights, diffusion_head_sample, diffusion_head_sample_reference
from fastlatent.ops.gather_rows import ShardTable, gather_rows, gather_rows_reference
from fastlatent.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from fastlatent.ops.linear import linear, linear_reference, quantize_rows
from fastlatent.ops.norm_modulate import norm_modulate, norm_modulate_reference
from fastlatent.ops.resize import resize, resize_reference
from fastlatent.ops.rope_append_kv import rope_append_kv, rope_append_kv_reference
from fastlatent.ops.sample_posterior import sample_posterior, sample_posterior_reference
from fastlatent.ops.solver_step import solver_step, solver_step_reference
from fastlatent.ops.swiglu_mlp import swiglu_mlp, swiglu_mlp_reference

__all__ = [
    "HeadWeights",
    "ShardTable",
    "decode_attention",
    "decode_attention_reference",
    "diffusion_head_sample",
    "diffusion_head_sample_reference",
    "gather_rows",
    "gather_rows_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "linear",
    "linear_reference",
    "norm_modulate",
    "norm_modulate_reference",
    "quantize_rows",
    "resize",
    "resize_reference",
    "rope_append_kv",
    "rope_append_kv_reference",
    "sample_posterior",
    "sample_posterior_reference",
    "solver_step",
    "solver_step_reference",
    "swiglu_mlp",
    "swiglu_mlp_reference",
]

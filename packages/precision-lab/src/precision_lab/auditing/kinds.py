"""What an operation of torch is, for a reader who thinks in layers."""

from __future__ import annotations

from typing import Any

MATMUL, CONV, ATTENTION, NORM, SOFTMAX, LOSS, SUM, CAST, REDUCE, QUANTISED, OTHER = (
    *("matmul", "convolution", "attention", "norm", "softmax", "loss", "sum", "cast", "reduction", "quantised"),
    "other",
)
PRODUCTS = (MATMUL, CONV, ATTENTION)

_BY_NAME = {
    MATMUL: "mm addmm bmm baddbmm addbmm mv addmv addr dot vdot linear matmul _scaled_mm _int_mm _grouped_mm "
    "_scaled_grouped_mm _linear_pointwise mkldnn_rnn_layer mkldnn_rnn_layer_backward lstm gru "
    "linear_backward _addmm_activation mkldnn_linear _cudnn_rnn _cudnn_rnn_backward _trilinear",
    CONV: "convolution convolution_backward _convolution mkldnn_convolution cudnn_convolution convolution_overrideable "
    "_convolution_pointwise conv_depthwise2d miopen_convolution",
    ATTENTION: "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention flex_attention "
    "_scaled_dot_product_attention_math _flash_attention_forward _flash_attention_backward",
    NORM: "native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm "
    "native_batch_norm_backward _native_batch_norm_legit _native_batch_norm_legit_functional cudnn_batch_norm "
    "_batch_norm_with_update batch_norm_backward cudnn_batch_norm_backward _fused_rms_norm _fused_rms_norm_backward "
    "rsqrt _native_batch_norm_legit_no_training miopen_batch_norm",
    SOFTMAX: "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data logsumexp _safe_softmax",
    LOSS: "nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward mse_loss mse_loss_backward "
    "binary_cross_entropy binary_cross_entropy_with_logits smooth_l1_loss huber_loss soft_margin_loss "
    "binary_cross_entropy_backward smooth_l1_loss_backward huber_loss_backward _ctc_loss",
    SUM: "sum mean var std var_mean cumsum cumprod prod norm linalg_vector_norm _foreach_norm nansum std_mean",
    CAST: "_to_copy",
}
_KINDS = {name: kind for kind, names in _BY_NAME.items() for name in names.split()}

_REDUCING = ("reduce",)
"""In the name of a collective that adds up: allreduce_, reduce_scatter_, _reduce_scatter_base_, reduce_."""


def kind_of(func: Any) -> str:
    """Returns the kind of a dispatched operation, by its name without overload."""
    namespace, name = func.namespace, func._schema.name.partition("::")[2]
    if namespace in ("c10d", "_c10d_functional", "c10d_functional"):
        return REDUCE if any(word in name for word in _REDUCING) else OTHER
    if namespace == "bitsandbytes":
        return QUANTISED
    return _KINDS.get(name, OTHER)

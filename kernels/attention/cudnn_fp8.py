"""Attention on E4M3 queries, keys and values by cuDNN's fused FP8 kernel. It is optional; `reference` defines it.

The package `cudnn` is NVIDIA's frontend, which is imported only where it is used. Names and limits are those of
versions 1.16 to 1.32 (github.com/NVIDIA/cudnn-frontend, node/sdpa_support_surface.h). cuDNN calls the probabilities P
"S": S = scale_s softmax(descale_q q (descale_k k)^T / sqrt(K)), out = scale_o descale_s S descale_v v.

Shapes: B samples, L queries, S keys, N heads, K head dim. cuDNN's order of dimensions is B, N, L, K; the strides give
    the layout in memory.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longvideo.kernels.attention.reference import E4M3

if TYPE_CHECKING:
    from collections.abc import Sequence

HOPPER = (9, 0)
MINIMUM_CUDNN, BROKEN_CUDNN = 90100, 91000
INSTALL = "pip install 'longvideo[cudnn]'"
ALIGNMENT = 16
"""Alignment of every pointer and row, bytes."""
OPERANDS = ("q", "k", "v", "out")
SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
MAXIMA = ("amax_s", "amax_o")
UIDS = {name: uid for uid, name in enumerate((*OPERANDS, *SCALES, *MAXIMA), start=1)}

logger = logging.getLogger(__name__)


def unavailable(device: torch.device) -> str | None:
    """Return why this attention cannot run on a device, with a remedy; None if it can."""
    if device.type != "cuda":
        return f"FP8 attention needs a CUDA GPU, got device {str(device)!r}"
    if not torch.cuda.is_available():
        return f"FP8 attention needs a CUDA GPU, torch {torch.__version__} finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < HOPPER:
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, FP8 attention needs 9.0 (Hopper) or newer"
        )
    try:
        import cudnn  # pyright: ignore[reportMissingImports]

        version = cudnn.backend_version()
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        message = str(error).partition("\n")[0]
        return f"nvidia-cudnn-frontend cannot be used ({type(error).__name__}: {message}); {INSTALL}"
    if version < MINIMUM_CUDNN or version == BROKEN_CUDNN:
        return f"cuDNN {version} has no FP8 attention; use 9.1.0 ({MINIMUM_CUDNN}) or newer, but not 9.10.0"
    return None


class CudnnFP8Attention:
    """Attention without a mask for one set of shapes, planned once.

    batch, query_tokens, key_tokens, heads, head_dim: B, L, S, N, K.
    q_strides, k_strides, v_strides, out_strides: strides of the tensors [B, L or S, N, K] that calls will pass, in
        elements; the last one is 1. None means contiguous.
    out_dtypes: dtypes of the output, in the order in which they are requested of cuDNN. Hopper gives E4M3 only;
        Blackwell gives BF16 since cuDNN 9.13.
    scale_q, scale_k, scale_v: factors that were applied to q, k and v before they were rounded.
    scale_p: factor of P in [0, 1] before it is rounded, so that small probabilities do not become zero.
    scale_out: factor of an E4M3 output; a BF16 output is not scaled.

    Attributes: out_dtype is the dtype that cuDNN accepted; attention is out.float() * out_scale.
    Raises ValueError with the reason where it cannot run, for strides that are not multiples of 16 bytes, and with
    cuDNN's message for shapes that cuDNN refuses.
    """

    def __init__(
        self,
        *,
        batch: int,
        query_tokens: int,
        key_tokens: int,
        heads: int,
        head_dim: int,
        device: torch.device,
        q_strides: Sequence[int] | None = None,
        k_strides: Sequence[int] | None = None,
        v_strides: Sequence[int] | None = None,
        out_strides: Sequence[int] | None = None,
        out_dtypes: Sequence[torch.dtype] = (torch.bfloat16, E4M3),
        scale_q: float = 1.0,
        scale_k: float = 1.0,
        scale_v: float = 1.0,
        scale_p: float = 256.0,
        scale_out: float = 1.0,
    ) -> None:
        if reason := unavailable(device):
            raise ValueError(f"no FP8 attention on device {str(device)!r}: {reason}")
        import cudnn  # pyright: ignore[reportMissingImports]

        tokens = dict(zip(OPERANDS, (query_tokens, key_tokens, key_tokens, query_tokens), strict=True))
        strides = dict(zip(OPERANDS, (q_strides, k_strides, v_strides, out_strides), strict=True))
        self._layouts = {
            name: _layout(name, (batch, tokens[name], heads, head_dim), strides[name]) for name in OPERANDS
        }
        self._cudnn = cudnn
        with torch.cuda.device(device):
            self._handle = cudnn.create_handle()
            # the driver frees it at exit; destroying it then would race with the end of the CUDA context
            weakref.finalize(self, cudnn.destroy_handle, self._handle).atexit = False
            self._graph, self.out_dtype = _plan(cudnn, self._handle, self._layouts, out_dtypes)
            self._workspace = torch.empty(self._graph.get_workspace_size(), dtype=torch.uint8, device=device)
            self.device = self._workspace.device
            applied = scale_out if self.out_dtype == E4M3 else 1.0
            self.out_scale = 1 / applied
            scales = (1 / scale_q, 1 / scale_k, 1 / scale_v, 1 / scale_p, scale_p, applied)
            values = dict(zip(SCALES, scales, strict=True)) | dict.fromkeys(MAXIMA, 0.0)
            self._scalars = {
                name: torch.full((1, 1, 1, 1), x, dtype=torch.float32, device=self.device) for name, x in values.items()
            }
            # later calls may use other streams than the one that fills the scalars
            torch.cuda.current_stream().synchronize()

    def __call__(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, out_BLNK: Tensor) -> None:
        """Attend on the current stream and write to out, which has out_dtype; q, k and v are E4M3.

        A call allocates nothing and the host does not wait, so a CUDA graph can record it after one call outside the
        graph. All calls share a workspace and must not overlap; a recorded graph needs this object alive.
        Raises ValueError for tensors of other shapes, strides, dtypes or devices than planned.
        """
        pointers = {UIDS[name]: scalar.data_ptr() for name, scalar in self._scalars.items()}
        for name, tensor in zip(OPERANDS, (q_BLNK, k_BSNK, v_BSNK, out_BLNK), strict=True):
            self._check(name, tensor)
            pointers[UIDS[name]] = tensor.data_ptr()
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            self._cudnn.set_stream(handle=self._handle, stream=stream)
            self._graph.execute(pointers, self._workspace.data_ptr(), handle=self._handle)

    def _check(self, name: str, tensor: Tensor) -> None:
        dtype = self.out_dtype if name == "out" else E4M3
        if tensor.dtype != dtype or tensor.device != self.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; expected {dtype} on {self.device}; convert it"
            )
        layout = self._layouts[name]
        if not layout.fits(tensor):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected {layout.shape} "
                f"and {layout.strides} as planned; build another CudnnFP8Attention for it"
            )
        if tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"{name} starts at {tensor.data_ptr():#x}; expected a multiple of {ALIGNMENT} bytes")


@dataclass(frozen=True)
class _Layout:
    """Shape [B, L or S, N, K] and strides, in elements, of an operand."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor has this shape, and these strides wherever there is more than one element."""
        triples = zip(self.shape, self.strides, tensor.stride(), strict=False)
        return tensor.shape == self.shape and all(size == 1 or expected == got for size, expected, got in triples)

    def described(self) -> dict[str, list[int]]:
        """Return dim and stride in cuDNN's order B, N, L or S, K."""
        batch, tokens, heads, head_dim = self.strides
        size = self.shape
        return {"dim": [size[0], size[2], size[1], size[3]], "stride": [batch, heads, tokens, head_dim]}


def _layout(name: str, shape: tuple[int, int, int, int], strides: Sequence[int] | None) -> _Layout:
    _, tokens, heads, head_dim = shape
    layout = _Layout(shape, tuple(strides or (tokens * heads * head_dim, heads * head_dim, head_dim, 1)))
    if layout.strides[-1] != 1 or any(stride % ALIGNMENT for stride in layout.strides[:-1]):
        raise ValueError(
            f"{name} has strides {layout.strides}; expected multiples of {ALIGNMENT}, and 1 as the last one; "
            "copy it to such a layout"
        )
    return layout


def _plan(
    cudnn: Any, handle: Any, layouts: dict[str, _Layout], out_dtypes: Sequence[torch.dtype]
) -> tuple[Any, torch.dtype]:
    """Return the finalized graph, and the first output dtype that cuDNN accepts."""
    version, refused = cudnn.backend_version(), []
    for out_dtype in out_dtypes:
        try:
            graph = _build_graph(cudnn, handle, layouts, out_dtype)
        # "not supported", and errors that the backend reports under another name
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            refused.append(f"no {out_dtype} output: {error}")
            continue
        logger.info("FP8 attention by cuDNN %d: %s", version, "; ".join((*refused, f"{out_dtype} output")))
        return graph, out_dtype
    shapes = {name: layout.shape for name, layout in layouts.items()}
    raise ValueError(f"cuDNN {version} has no FP8 attention for {shapes}; use BF16 attention; {'; '.join(refused)}")


def _build_graph(cudnn: Any, handle: Any, layouts: dict[str, _Layout], out_dtype: torch.dtype) -> Any:
    real, e4m3 = cudnn.data_type.FLOAT, cudnn.data_type.FP8_E4M3
    graph = cudnn.pygraph(handle=handle, io_data_type=e4m3, intermediate_data_type=real, compute_data_type=real)
    scalar = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
    inputs = {
        name: graph.tensor(name=name, uid=UIDS[name], data_type=e4m3, **layouts[name].described())
        for name in ("q", "k", "v")
    }
    scales = {name: graph.tensor(name=name, uid=UIDS[name], data_type=real, **scalar) for name in SCALES}
    head_dim = layouts["q"].shape[-1]
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        **inputs, **scales, attn_scale=head_dim**-0.5, generate_stats=False, name="attention"
    )
    outputs = {
        "out": (out, layouts["out"].described(), {E4M3: e4m3, torch.bfloat16: cudnn.data_type.BFLOAT16}[out_dtype]),
        "amax_s": (amax_s, scalar, real),
        "amax_o": (amax_o, scalar, real),
    }
    for name, (tensor, shape, dtype) in outputs.items():
        tensor.set_uid(UIDS[name]).set_output(True).set_dim(shape["dim"]).set_stride(shape["stride"])
        tensor.set_data_type(dtype)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph

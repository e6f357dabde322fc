"""What other libraries' Triton kernels reach by the same kind of account, as data: none of them is installed here.

Source: the peer audit under Triton 3.8.0, each library's best configuration at its own headline width (CLIP D = 512,
SigLIP D = 768), taken of the FLOPs that its kernels count as useful themselves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeerFigure:
    """One kernel's shares.

    Attributes:
        phase: what its launches do, "forward", "backward" or "both".
        counted: FLOPs of a pair and a feature that all launches of the phase count as useful. A kernel that owns rows and
            multiplies S again for the owner of the columns counts 8 where 6 are needed.
        share, share4, serial: of those.
        remark: what holds it back.
    """

    arch: str
    request: str
    phase: str
    library: str
    kernel: str
    counted: int
    share: float
    share4: float
    serial: float
    remark: str


PEERS = (
    PeerFigure("sm90", "maxsim", "forward", "late-interaction-kernels", "maxsim_fwd", 2, 1.00, 0.78, 0.44, "mma.sync"),
    PeerFigure("sm90", "maxsim", "forward", "flash-maxsim", "maxsim_fwd", 2, 1.00, 0.66, 0.40, "mma.sync"),
    PeerFigure("sm90", "CLIP", "forward", "memeff", "clip_denom", 2, 1.00, 1.00, 0.58, "atomics"),
    PeerFigure(
        "sm90", "CLIP", "backward", "memeff", "clip_fa_grad", 8, 0.67, 0.67, 0.44, "S per owner; 1.5 x the FLOPs"
    ),
    PeerFigure("sm90", "CLIP", "backward", "memeff", "clip_grad_both", 6, 0.60, 0.60, 0.32, "tf32, spills, atomics"),
    PeerFigure("sm90", "CLIP", "forward", "inf-cl", "prob_fwd", 2, 0.50, 0.50, 0.28, "tf32"),
    PeerFigure("sm90", "CLIP", "backward", "inf-cl", "dq, dk", 8, 0.50, 0.47, 0.24, "S per owner; tf32, spills"),
    PeerFigure("sm90", "SigLIP", "both", "siglip-kernel", "fused", 8, 0.67, 0.66, 0.33, "S per owner; tf32"),
    PeerFigure("sm90", "cross-entropy", "forward", "cut-cross-entropy", "cce_lse", 2, 1.00, 1.00, 0.51, "locks"),
    PeerFigure("sm90", "cross-entropy", "backward", "cut-cross-entropy", "cce_backward", 6, 1.00, 1.00, 0.54, "locks"),
    PeerFigure("sm100", "CLIP", "forward", "memeff", "clip_denom", 2, 1.00, 0.47, 0.32, "atomics"),
    PeerFigure("sm100", "CLIP", "backward", "memeff", "clip_fa_grad", 8, 0.50, 0.50, 0.30, "cannot start: 256 KiB"),
    PeerFigure("sm100", "CLIP", "backward", "memeff", "clip_grad_both", 6, 0.38, 0.22, 0.14, "tf32, atomics"),
    PeerFigure("sm100", "CLIP", "forward", "inf-cl", "prob_fwd", 2, 0.25, 0.25, 0.12, "tf32"),
    PeerFigure("sm100", "CLIP", "backward", "inf-cl", "dq, dk", 8, 0.25, 0.18, 0.11, "S per owner; tf32, spills"),
    PeerFigure("sm100", "SigLIP", "both", "siglip-kernel", "fused", 8, 0.67, 0.34, 0.23, "S per owner; tf32, spills"),
    PeerFigure(
        "sm100", "cross-entropy", "forward", "cut-cross-entropy", "cce_lse", 2, 0.94, 0.33, 0.25, "locks, spills"
    ),
    PeerFigure("sm100", "cross-entropy", "backward", "cut-cross-entropy", "cce_backward", 6, 1.00, 0.63, 0.39, "locks"),
    PeerFigure("sm80", "CLIP", "forward", "memeff", "clip_denom", 2, 1.00, 1.00, 0.64, "atomics"),
    PeerFigure("sm80", "CLIP", "backward", "memeff", "clip_fa_grad", 8, 1.00, 1.00, 0.73, "S per owner"),
    PeerFigure("sm80", "CLIP", "backward", "memeff", "clip_grad_both", 6, 0.43, 0.43, 0.23, "tf32, atomics"),
    PeerFigure("sm80", "CLIP", "forward", "inf-cl", "prob_fwd", 2, 0.50, 0.50, 0.32, "tf32"),
    PeerFigure("sm80", "CLIP", "backward", "inf-cl", "dq, dk", 8, 0.50, 0.50, 0.28, "S per owner; tf32, spills"),
    PeerFigure("sm80", "SigLIP", "both", "siglip-kernel", "fused", 8, 0.67, 0.67, 0.34, "S per owner; tf32"),
    PeerFigure("sm80", "cross-entropy", "forward", "cut-cross-entropy", "cce_lse", 2, 1.00, 1.00, 0.61, "locks"),
    PeerFigure(
        "sm80", "cross-entropy", "backward", "cut-cross-entropy", "cce_backward", 6, 1.00, 1.00, 0.60, "locks, spills"
    ),
)


def peers_of(arch: str, request: str) -> list[PeerFigure]:
    return [each for each in PEERS if (each.arch, each.request) == (arch, request)]

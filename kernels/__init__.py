"""Losses and operators over similarity matrices that are never stored.

Start with `ClipLoss` or `SigLipLoss` to replace the loss of an existing code base, and with
`similarity_reduce` to write a new one; README.md beside this file says which entry point is for what.
"""

# With the root of the repository on the path this folder also answers to `import kernels`, the name of a
# package on PyPI that transformers looks for. Under that name it stays empty: no work, no operators
# registered twice, and no `__version__`, by which it could be taken for the other package.
if "." in __name__:
    import warnings

    from .backends import use_backend
    from .build import build
    from .contrastive import (
        AbovePositive,
        ArgMax,
        ArgTopK,
        ColumnRange,
        CountAbove,
        Diagonal,
        DifferentId,
        HingeSum,
        LogSumExp,
        Max,
        Paced,
        PairScore,
        SameId,
        SoftmaxMean,
        SoftplusSum,
        Target,
        Teacher,
        TopK,
        similarity_reduce,
        use_memory_budget,
    )
    from .info import info
    from .late_interaction import (
        AttentionPooling,
        LogSumExpPooling,
        MaxPooling,
        SoftmaxPooling,
        TopMeanPooling,
        filip_similarity,
        maxsim,
        maxsim_pairs,
        maxsim_varlen,
        project_max,
    )
    from .losses import (
        AlignmentUniformityLoss,
        CACRLoss,
        CircleLoss,
        ClipLoss,
        CoCaLoss,
        CWCLLoss,
        DebiasedContrastiveLoss,
        DecoupledContrastiveLoss,
        DistillClipLoss,
        FilipLoss,
        HardNegativeLoss,
        MatryoshkaLoss,
        ModXLoss,
        MomentumDistillationLoss,
        MultiPositiveLoss,
        SDMLoss,
        SigLipLoss,
        SigLipPlusLoss,
        SoftClipLoss,
        SoftTargetLoss,
        TripletLoss,
        VicinityMixLoss,
        linear_cross_entropy,
        over_scores,
        vicinity_mix,
    )

    __all__ = [
        "AbovePositive",
        "AlignmentUniformityLoss",
        "ArgMax",
        "ArgTopK",
        "AttentionPooling",
        "CACRLoss",
        "CWCLLoss",
        "CircleLoss",
        "ClipLoss",
        "CoCaLoss",
        "ColumnRange",
        "CountAbove",
        "DebiasedContrastiveLoss",
        "DecoupledContrastiveLoss",
        "Diagonal",
        "DifferentId",
        "DistillClipLoss",
        "FilipLoss",
        "HardNegativeLoss",
        "HingeSum",
        "LogSumExp",
        "LogSumExpPooling",
        "MatryoshkaLoss",
        "Max",
        "MaxPooling",
        "ModXLoss",
        "MomentumDistillationLoss",
        "MultiPositiveLoss",
        "Paced",
        "PairScore",
        "SDMLoss",
        "SameId",
        "SigLipLoss",
        "SigLipPlusLoss",
        "SoftClipLoss",
        "SoftTargetLoss",
        "SoftmaxMean",
        "SoftmaxPooling",
        "SoftplusSum",
        "Target",
        "Teacher",
        "TopK",
        "TopMeanPooling",
        "TripletLoss",
        "VicinityMixLoss",
        "build",
        "filip_similarity",
        "info",
        "linear_cross_entropy",
        "maxsim",
        "maxsim_pairs",
        "maxsim_varlen",
        "over_scores",
        "project_max",
        "similarity_reduce",
        "use_backend",
        "use_memory_budget",
        "vicinity_mix",
    ]

    # `python -m pairtile.kernels.info` runs a module that this package has imported already. runpy warns of
    # two copies; that module keeps no state, so two copies do no harm.
    warnings.filterwarnings("ignore", message=".*pairtile.kernels.info.*", category=RuntimeWarning, module="runpy")

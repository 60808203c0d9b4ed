"""Flags of REPA's and SRA's generate.py and of SiT's sample_ddp.py (docs/coming-from-repa.md)."""

from common.foreign_flags import FUSED_ATTENTION, TIME_CUTOFFS, ForeignFlags, UnusedFlag

_HEADS = "alignment heads are not loaded, because sampling does not use them"
_LAUNCHER = "the environment variables of torchrun describe the processes"
_DIFFUSION = (
    "not available: the SDE has the diffusion coefficient 2 t, which is SiT's sigma with norm 1 on "
    "the linear path; remove the flag"
)
_LAST_STEP = (
    "not available: the last step of --mode sde has length 0.04 and adds no noise, which is SiT's "
    "Mean; remove the flag"
)

FOREIGN_FLAGS = ForeignFlags(
    unused=(
        UnusedFlag(
            "--legacy",
            "the block names of REPA's early checkpoints are recognized in the file",
            is_switch=True,
        ),
        FUSED_ATTENTION,
        UnusedFlag("--encoder-depth", _HEADS),
        UnusedFlag("--projector-embed-dims", _HEADS),
        UnusedFlag("--local-rank", _LAUNCHER),
        UnusedFlag("--world_size", _LAUNCHER),
        UnusedFlag("--dist_url", _LAUNCHER),
    ),
    replacements={
        # SiT
        "ODE": "pass --mode ode",
        "SDE": "pass --mode sde",
        "--image-size": "pass --resolution, or remove the flag: the checkpoint determines the size",
        "--num-sampling-steps": "pass --num-steps",
        "--sampling-method": "pass --mode sde for Euler-Maruyama steps, or --mode ode for Euler "
        "steps, with --heun for Heun's method or --dopri5 for Dormand-Prince steps",
        "--prediction": "not needed: the checkpoint records the prediction; remove the flag",
        "--loss-weight": "not needed: it only affects training; remove the flag",
        **TIME_CUTOFFS,
        "--reverse": "not available: the ODE is only solved from noise to data; remove the flag",
        "--likelihood": "not available: likelihoods are not computed; remove the flag",
        "--diffusion-form": _DIFFUSION,
        "--diffusion-norm": _DIFFUSION,
        "--last-step": _LAST_STEP,
        "--last-step-size": _LAST_STEP,
    },
)

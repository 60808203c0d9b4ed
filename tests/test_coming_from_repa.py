"""Compare docs/coming-from-repa.md with flags of the other repositories and with our parsers."""

import re
import shlex

import pytest

import sample_ddp
from common.cli import Parser
from common.foreign_flags import ForeignFlags
from preprocessing import encode_latents, import_repa
from preprocessing.foreign_flags import FOREIGN_FLAGS as ENCODING_FLAGS
from sampling.foreign_flags import FOREIGN_FLAGS as SAMPLING_FLAGS
from tests.helpers import ROOT
from tests.preprocessing.test_import_repa import make_repa_folder
from training.config import parse_settings
from training.foreign_flags import FOREIGN_FLAGS as TRAINING_FLAGS

PAGE = (ROOT / "docs/coming-from-repa.md").read_text()

# Heading of a table -> flags of the program, recorded from the repositories in November 2026.
THEIR_FLAGS = {
    "train.py of REPA": """output-dir exp-name logging-dir report-to sampling-steps resume-step
        model num-classes encoder-depth fused-attn qk-norm data-dir resolution batch-size allow-tf32
        mixed-precision epochs max-train-steps checkpointing-steps gradient-accumulation-steps
        learning-rate adam-beta1 adam-beta2 adam-weight-decay adam-epsilon max-grad-norm seed
        num-workers path-type prediction cfg-prob enc-type proj-coeff weighting legacy""",
    "generate.py of REPA": """global-seed tf32 ckpt sample-dir model num-classes encoder-depth
        resolution fused-attn qk-norm vae per-proc-batch-size num-fid-samples mode cfg-scale
        projector-embed-dims path-type num-steps heun guidance-low guidance-high legacy""",
    "dataset_tools.py of REPA and SRA": "source dest max-images transform resolution model-url",
    "train.py of SRA": """output-dir exp-name logging-dir resume-ckpt sample-steps epochs
        checkpoint-steps checkpoint-epochs max-train-steps model num-classes fused-attn qk-norm
        data-dir-train resolution batch-size mixed-precision gradient-accumulation-steps
        learning-rate adam-beta1 adam-beta2 adam-weight-decay adam-epsilon max-grad-norm seed
        num-workers loss-type cfg-prob path-type prediction weighting block-out-s block-out-t
        t-max""",
    "generate.py of SRA": """global-seed tf32 ckpt sample-dir model num-classes resolution
        fused-attn qk-norm vae per-proc-batch-size num-fid-samples mode cfg-scale path-type
        num-steps heun guidance-low guidance-high world_size local-rank dist_url""",
    "train.py of SiT": """data-path results-dir model image-size num-classes epochs
        global-batch-size global-seed vae num-workers log-every ckpt-every sample-every cfg-scale
        wandb ckpt path-type prediction loss-weight sample-eps train-eps""",
    "sample_ddp.py of SiT": """model vae sample-dir per-proc-batch-size num-fid-samples image-size
        num-classes cfg-scale num-sampling-steps global-seed tf32 ckpt path-type prediction
        loss-weight sample-eps train-eps sampling-method atol rtol reverse likelihood
        diffusion-form diffusion-norm last-step last-step-size""",
}
# Heading of a table -> flags that also have the form --no-NAME.
THEIR_SWITCHES = {
    "train.py of REPA": "fused-attn qk-norm legacy",
    "generate.py of REPA": "tf32 fused-attn qk-norm heun legacy",
    "generate.py of SRA": "tf32 fused-attn qk-norm heun",
}
KINDS = ("same", "other name", "other meaning", "not needed", "not available")


def list_their_flags(program: str) -> list[str]:
    """Return the recorded flags of a program."""
    return [f"--{name}" for name in THEIR_FLAGS[program].split()]


def read_table(program: str) -> dict[str, tuple[list[str], str]]:
    """Return our flags and the comparison for each of their flags in the table of a program."""
    (section,) = re.findall(rf"^### {re.escape(program)}\n(.*?)(?=^#|\Z)", PAGE, re.S | re.M)
    rows = re.findall(r"^\| `(--\S+)` \| (.*?) ?\| (.*) \|$", section, re.M)
    assert len({flag for flag, _, _ in rows}) == len(rows)
    return {flag: (re.findall(r"`(--[\w-]+)`", ours), text) for flag, ours, text in rows}


def find_command(program: str) -> tuple[dict[str, str], ForeignFlags]:
    """Return the flags that our corresponding command accepts, and those that it recognizes.

    The accepted flags are the keys of a dictionary. Names of the same setting have equal values.
    """
    if program.startswith("train"):
        foreign_flags, parse = TRAINING_FLAGS, parse_settings
    elif program.startswith("dataset_tools"):
        foreign_flags, parse = ENCODING_FLAGS, lambda argv: encode_latents.parse_args()
    else:
        foreign_flags, parse = SAMPLING_FLAGS, sample_ddp.parse_args
    accepted: dict[str, str] = {}

    def record(parser, *args, **kwargs):
        actions = parser._option_string_actions
        accepted.update({flag: action.dest for flag, action in actions.items()})
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", record)
        with pytest.raises(SystemExit):
            parse([])
    return accepted, foreign_flags


@pytest.mark.parametrize("program", THEIR_FLAGS)
def test_table_lists_all_their_flags_and_only_flags_of_ours_that_exist(program):
    table = read_table(program)
    assert sorted(table) == sorted(list_their_flags(program))
    accepted, foreign_flags = find_command(program)
    unused = {flag.name for flag in foreign_flags.unused}
    for flag, (ours, text) in table.items():
        assert text.startswith(KINDS), flag
        assert set(ours) <= accepted.keys(), flag
        # Every flag works, is accepted with a message, or ends in an error with a remedy.
        assert (flag in accepted) != (flag in foreign_flags.replacements), flag
        assert ("accepted with a message" in text) == (flag in unused), flag
        if text.startswith("same"):
            assert flag not in unused, flag
            assert {accepted[name] for name in ours} == {accepted[flag]}, flag
        if text.startswith("other name"):
            remedy = foreign_flags.replacements[flag]
            assert all(name in remedy for name in ours), flag


@pytest.mark.parametrize("program", THEIR_SWITCHES)
def test_negated_switches_are_accepted(program):
    flags = [f"--no-{name}" for name in THEIR_SWITCHES[program].split()]
    if program.startswith("train"):
        settings = parse_settings(["--exp-name", "x", "--data-dir", "x", *flags])
        assert settings.model.qk_norm is False
    else:
        config = sample_ddp.parse_args(["--ckpt", "x", *flags])
        assert config.checkpoint.qk_norm is config.sampler.heun is False
        assert config.precision.allow_tf32 is False


def read_commands(script: str) -> list[list[str]]:
    """Return the arguments of the commands on the page that run a script or module."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    commands = [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    return [words[words.index(script) + 1 :] for words in commands if script in words]


def test_training_commands_set_the_values_of_repa_and_sra():
    repa, sra = (parse_settings(words) for words in read_commands("train.py"))
    (alignment,) = repa.alignments
    assert (alignment.method, alignment.block, alignment.weight) == ("repa", 8, 0.5)
    assert alignment.settings.encoder == "dinov2-vit-b" and repa.log.report_to == ("wandb",)
    assert str(repa.run.folder) == "exps/linear-dinov2-b-enc8" and repa.device.allow_tf32
    (alignment,) = sra.alignments
    assert (alignment.method, alignment.block, alignment.weight) == ("sra", 8, 0.5)
    assert (alignment.settings.teacher_block, alignment.settings.t_max) == (20, 0.2)


def test_command_of_repa_without_a_method_ends_in_an_error_with_the_remedy(call):
    import train

    (words, _) = read_commands("train.py")
    words = words[2:]  # without --align repa
    code, out = call(train, *words)
    assert code == 2 and "--enc-type" in out and "needs --align repa" in out


def test_sampling_command_is_that_of_repa(caplog):
    caplog.set_level("INFO")
    (words,) = read_commands("sample_ddp.py")
    config = sample_ddp.parse_args(words)
    assert (config.sampler.num_steps, config.sampler.guidance_high) == (250, 0.7)
    assert [message.split()[0] for message in caplog.messages] == [
        "--encoder-depth",
        "--projector-embed-dims",
    ]


def test_data_command_runs_as_written(call, vae_folder, tmp_path, monkeypatch):
    (words,) = read_commands("preprocessing.import_repa")
    monkeypatch.chdir(tmp_path)
    make_repa_folder(tmp_path / words[0], vae_folder)
    code, out = call(import_repa, *words, "--vae", vae_folder)
    assert code == 0, out

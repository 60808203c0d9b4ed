"""Sample images from a checkpoint into an .npz, on one or many processes, and evaluate them.

    torchrun --nproc_per_node 8 sample_ddp.py --ckpt exps/sit-xl2-sra2 --num-fid-samples 50000

An image depends only on the checkpoint, the flags and the index of the image, and not on the number
of processes or on other images. Each batch is stored in separate files until all batches exist, so
rerunning an interrupted command resumes it.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpointing import pretrained
from checkpointing.official import ORIGINS
from checkpointing.pretrained import PretrainedModel
from checkpointing.storage import CheckpointError
from common import cli
from common.cli import UserError, format_flags
from common.compile_cache import CompileCache, choose_folder
from common.config import add_flags, get_flag_of_field, read_flags, record_flags, setting
from common.files import sha256
from common.logs import get_logger
from common.processes import World
from common.progress import ProgressBar
from common.tf32 import set_tf32
from evaluations.runs import JsonObject
from evaluations.suite import (
    EvaluationConfig,
    EvaluationSuite,
    check_sample_count,
    format_results,
    read_result,
)
from interpolant import INTERPOLANTS
from models.autoencoder import Autoencoder
from models.errors import FieldError
from models.labels import describe_empty_classes
from models.sit import PRESETS, SiT, SiTBlock
from sampling.foreign_flags import FOREIGN_FLAGS
from sampling.recipe import Recipe, SamplerConfig, cast_matmul_weights, format_ranges
from sampling.store import SampleStore
from sampling.worker import Worker, run_batches

logger = get_logger(__name__)


@dataclass(frozen=True)
class CheckpointConfig:
    """The network to sample from, and the VAE that decodes its latents."""

    ckpt: Path = setting(
        help="a run (exps/NAME selects its latest checkpoint), a checkpoint of a run, an "
        "ema.safetensors, a folder written by checkpointing.export, or a .pt or .safetensors file "
        "of the SiT, REPA or SRA repositories",
    )
    ema_decay: float | None = setting(
        None, type=cli.decay, help="decay of the EMA, if a run has several (default: the first)"
    )
    model: str | None = setting(
        None, choices=PRESETS, metavar="NAME", help="architecture of a .pt file, such as SiT-XL/2"
    )
    origin: str | None = setting(
        None, choices=ORIGINS, help="repository of a .pt file, if it cannot be inferred"
    )
    path_type: str | None = setting(
        None,
        choices=sorted(INTERPOLANTS),
        help="interpolant that a .pt file was trained on, if it cannot be inferred",
    )
    vae: str | None = setting(
        None,
        help="hub id or folder of the VAE; ema and mse are those of REPA's generate.py (default: "
        "the VAE that encoded the training data)",
    )
    resolution: int | None = setting(
        None, type=cli.positive_int, help="image size in pixels that the checkpoint must have"
    )
    num_classes: int | None = setting(
        None, type=cli.positive_int, help="number of classes that the checkpoint must have"
    )
    qk_norm: bool | None = setting(
        None,
        action=argparse.BooleanOptionalAction,
        help="whether the checkpoint must have QK normalization",
    )


@dataclass(frozen=True)
class PrecisionConfig:
    """Precision and compilation of the network."""

    mixed_precision: str = setting(
        "no", choices=("no", "bf16"), help="dtype of the network's matrix products; no: float32"
    )
    allow_tf32: bool = setting(
        True,
        action=argparse.BooleanOptionalAction,
        flags=("--allow-tf32", "--tf32"),
        help="TF32 for float32 matrix products and convolutions on GPUs, as in REPA's generate.py",
    )
    compile: bool = setting(False, help="compile the blocks of the network")

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the network's matrix products."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32


@dataclass(frozen=True)
class OutputConfig:
    """The number of images, and the files that they are written to."""

    num_fid_samples: int = setting(50_000, type=cli.positive_int, help="number of images")
    per_proc_batch_size: int = setting(32, type=cli.positive_int, help="images per batch")
    sample_dir: Path = setting(Path("samples"), help="folder for NAME.npz, NAME.json and NAME.png")
    name: str | None = setting(
        None, help="name of the files (default: composed of run, step and sampler flags)"
    )
    png: bool = setting(False, help="also write each image to NAME/INDEX.png")
    evaluate: Path | None = setting(
        None, help="reference for metrics of the samples (see --reference of evaluations.evaluate)"
    )
    no_npz: bool = setting(
        False, help="discard the images and keep only the grid and the metrics; needs --evaluate"
    )


class SamplingConfig(NamedTuple):
    """All settings of the command. Each field is a group of flags."""

    checkpoint: CheckpointConfig
    sampler: SamplerConfig
    precision: PrecisionConfig
    output: OutputConfig
    evaluation: EvaluationConfig


def parse_args(argv: list[str] | None = None) -> SamplingConfig:
    """Parse and validate the flags. With --print-config, print the settings and exit.

    Raises:
        UserError: A flag is unknown, is out of range or contradicts another flag.
    """
    parser = cli.Parser(__doc__, "sample_ddp.py", "--ckpt PATH")
    parser.add_argument("--print-config", action="store_true", help="print all settings and exit")
    groups = SamplingConfig.__annotations__
    for title, group in groups.items():
        add_flags(parser.add_argument_group(title), group)
    args = FOREIGN_FLAGS.parse(parser, argv)
    config = SamplingConfig(*(read_flags(group, args) for group in groups.values()))

    with convert_field_errors(SamplerConfig):
        config.sampler.validate()
    if config.output.no_npz and config.output.evaluate is None:
        raise UserError(
            "--no-npz would discard the samples without evaluating them; add --evaluate PATH"
        )
    if args.print_config:
        print(format_flags(record_flags(*config)))
        raise SystemExit
    return config


@contextmanager
def convert_field_errors(config: type) -> Iterator[None]:
    """Convert a FieldError about a field of `config` to a UserError about the flag of the field."""
    try:
        yield
    except FieldError as error:
        raise UserError(f"{get_flag_of_field(config, error.field)} {error.reason}") from None


def main() -> None:
    """Sample, store and evaluate the images that the flags specify."""
    config = parse_args()
    world = World()
    device = world.select_device()
    cli.print_warning(config.sampler.describe_ignored_settings())
    set_precision_and_threads(config.precision, device)

    # Load the network and the VAE, and collect the settings that determine the images.
    source, vae = load_networks(config.checkpoint, device, world)
    check_network(config.checkpoint, source, vae)
    model = prepare_model(source.model, config.precision, device)
    recipe = make_recipe(config, source)
    record = build_record(config, source, vae, recipe, device)
    check_vae(vae, record["vae_fingerprint"], source)
    suite = make_suite(config, model, vae, device, world)

    # Create the store of the samples.
    networks = suite.networks if suite else {}
    store = SampleStore(
        config.output.sample_dir,
        config.output.name or make_default_name(source, recipe),
        record,
        networks=suite.identity["features"] if suite else {},
        keep_images=not config.output.no_npz,
        write_pngs=config.output.png,
    )
    labels = recipe.compute_labels(torch.arange(store.count), model.config.num_classes).numpy()
    store.choose_grid_images(labels)
    note = describe_untrained_labels(labels, recipe, source)
    if note:
        logger.info(note)

    with ExitStack() as resources:
        stored_batches = world.run_on_first_rank(lambda: store.claim(resources))
        store.open_npz()

        # Load the reference, unless the samples have already been evaluated.
        result: JsonObject = {}
        is_evaluated = False
        if suite is not None:
            result = world.run_on_first_rank(lambda: read_metrics(suite, store))
            missing = suite.find_missing_results(result) if result else []
            # Without the images, only sampling again could compute the missing results.
            is_evaluated = bool(result) and (not missing or config.output.no_npz)
            if missing and is_evaluated:
                logger.info(
                    "%s lacks %s, and the images were discarded: remove the file to sample and "
                    "evaluate again",
                    store.metrics_path,
                    ", ".join(missing),
                )
            if is_evaluated:
                stored_batches = stored_batches._replace(features=set(store.batches))
            else:
                suite.load_reference()

        # Sample the missing batches. Each of n processes takes every n-th batch.
        pending = store.find_pending_batches(stored_batches)
        if pending:  # some of their images may be copied from NAME.npz
            world.run_on_first_rank(store.verify_npz)
        worker = Worker(model, vae, recipe, config.precision.dtype, store, stored_batches, networks)
        sample_batches(worker, pending, config, world)
        world.barrier()

        if world.rank == 0:
            store.finalize(labels)
            if suite is not None and not is_evaluated:
                result = suite.write_results(
                    store.metrics_path,
                    build_metrics_identity(suite, store),
                    store.read_features(),
                    labels,
                    result,
                )
            store.remove_parts_folder()
            print(format_outcome(store, result, has_new_images=bool(pending)))
    world.close()


def set_precision_and_threads(config: PrecisionConfig, device: torch.device) -> None:
    """Set whether GPUs use TF32, and the number of threads of an operation on the CPU."""
    set_tf32(config.allow_tf32)
    if device.type != "cuda":
        # The order of summation, and therefore the last bit of a sum, depends on the number of
        # threads of an operation. Run each operation on one thread, and several batches at once.
        torch.set_num_threads(1)


def load_networks(
    config: CheckpointConfig, device: torch.device, world: World
) -> tuple[PretrainedModel, Autoencoder]:
    """Load the network into host memory and the VAE onto `device`.

    Raises:
        UserError: The network or the VAE does not exist or cannot be loaded.
    """
    try:
        # One process chooses the checkpoint, because the training run may save a newer checkpoint
        # in the meantime.
        path = world.run_on_first_rank(lambda: pretrained.resolve_checkpoint(config.ckpt))
        source = pretrained.load(
            path, config.ema_decay, config.model, config.origin, config.path_type
        )
    except CheckpointError as error:
        raise UserError(f"--ckpt {config.ckpt}: {error}") from None
    with convert_field_errors(CheckpointConfig):
        return source, Autoencoder(config.vae or source.vae, device)


def check_network(config: CheckpointConfig, source: PretrainedModel, vae: Autoencoder) -> None:
    """Raise UserError if the network is not the one that the flags describe."""
    network = source.model.config
    resolution = network.latent_size * vae.downsampling_factor
    if config.resolution not in (None, resolution):
        raise UserError(
            f"--resolution {config.resolution}: {config.ckpt} generates images of "
            f"{resolution}x{resolution} pixels; remove the flag"
        )
    if config.num_classes not in (None, network.num_classes):
        raise UserError(
            f"--num-classes {config.num_classes}: {config.ckpt} has {network.num_classes} classes; "
            "remove the flag"
        )
    if config.qk_norm not in (None, network.qk_norm):
        flag = "--qk-norm" if config.qk_norm else "--no-qk-norm"
        state = "QK normalization" if network.qk_norm else "no QK normalization"
        raise UserError(f"{flag}: {config.ckpt} has {state}; remove the flag")


def prepare_model(model: SiT, config: PrecisionConfig, device: torch.device) -> SiT:
    """Move the network to `device`, cast its weights, and compile its blocks if requested."""
    model = model.to(device)
    cast_matmul_weights(model, config.dtype)
    if config.compile:
        for module in model.modules():
            if isinstance(module, SiTBlock):
                # A guidance interval has two batch sizes: compile a graph for each.
                module.compile(dynamic=False)
    return model


def make_recipe(config: SamplingConfig, source: PretrainedModel) -> Recipe:
    """Combine the sampler's flags with the objective of the network, and load the labels.

    Raises:
        UserError: The labels do not match the network or the number of images.
    """
    recipe = Recipe(
        **vars(config.sampler), path_type=source.path_type, prediction=source.prediction
    )
    with convert_field_errors(SamplerConfig):
        return recipe.with_loaded_labels(
            source.model.config.num_classes, config.output.num_fid_samples
        ).for_trained_labels(source.trained_labels)


def describe_untrained_labels(
    labels: np.ndarray, recipe: Recipe, source: PretrainedModel
) -> str | None:
    """Return a note about classes without training images, or None if it is not needed.

    Args:
        labels: Class of each image, (n,).
        recipe: Settings of the sampler.
        source: The network.
    """
    counts = source.trained_labels.images_per_class
    if counts is None:
        if not recipe.draws_labels or recipe.all_classes:
            return None
        return (
            f"{source.identity['checkpoint']} does not record the number of training images per "
            f"class: labels are drawn from all {source.model.config.num_classes:,} classes"
        )
    if recipe.label_classes is not None:
        return f"the training data have {describe_empty_classes(counts, source.class_names)}"
    untrained = [k for k in np.unique(labels).tolist() if not counts[k]]
    if not untrained:
        return None
    return (
        f"warning: the labels contain classes without training images: {format_ranges(untrained)}"
    )


def build_record(
    config: SamplingConfig,
    source: PretrainedModel,
    vae: Autoencoder,
    recipe: Recipe,
    device: torch.device,
) -> JsonObject:
    """Return all settings that determine the images, for NAME.json and metrics.json."""
    is_adaptive = recipe.dopri5
    labels_sha256 = sha256(Path(recipe.labels)) if recipe.explicit_labels is not None else None
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        **source.identity,
        "path_type": recipe.path_type,
        "prediction": recipe.prediction,
        "mode": recipe.mode,
        "solver": recipe.solver,
        "num_steps": None if is_adaptive else recipe.num_steps,
        "atol": recipe.atol if is_adaptive else None,
        "rtol": recipe.rtol if is_adaptive else None,
        "cfg_scale": recipe.cfg_scale,
        "guidance_low": recipe.guidance_low,
        "guidance_high": recipe.guidance_high,
        "labels": recipe.labels,
        "labels_sha256": labels_sha256,
        **recipe.describe_label_classes(),
        "global_seed": recipe.seed,
        "count": config.output.num_fid_samples,
        "per_proc_batch_size": config.output.per_proc_batch_size,
        "vae": vae.name,
        "vae_fingerprint": vae.fingerprint(),
        "mixed_precision": config.precision.mixed_precision,
        "allow_tf32": config.precision.allow_tf32 and device.type == "cuda",
        "state_dtype": recipe.state_dtype,
        "compile": config.precision.compile,
        "machine": {"device": device_name, "torch": torch.__version__},
        "class_names": source.class_names,
    }


def check_vae(vae: Autoencoder, fingerprint: str, source: PretrainedModel) -> None:
    """Raise UserError if the VAE is known to differ from the VAE that encoded the training data."""
    if source.vae_fingerprint not in (None, fingerprint):
        raise UserError(
            f"--vae {vae.name} has different weights from the VAE that encoded the training data "
            f"({source.vae}); choose the same VAE"
        )
    channels = source.model.config.channels
    if vae.channels != channels:
        raise UserError(
            f"--vae {vae.name} decodes {vae.channels} channels, but the network generates "
            f"{channels}; choose another VAE"
        )


def make_default_name(source: PretrainedModel, recipe: Recipe) -> str:
    """Return the default name of the files: run, step, solver, guidance, labels and seed."""
    name = f"{source.name}-{recipe.solver}"
    if not recipe.dopri5:
        name += str(recipe.num_steps)
    if recipe.cfg_scale > 1:
        name += f"-cfg{recipe.cfg_scale:g}"
        if (recipe.guidance_low, recipe.guidance_high) != (0, 1):
            name += f"-from{recipe.guidance_low:g}-to{recipe.guidance_high:g}"
    if recipe.explicit_labels is not None:
        name += f"-labels{sha256(Path(recipe.labels))[:8]}"
    elif recipe.labels == "balanced":
        name += "-balanced"
    elif recipe.labels != "random":
        name += f"-class{recipe.labels}"
    if recipe.draws_labels and recipe.all_classes:
        name += "-all-classes"
    return f"{name}-seed{recipe.seed}"


def make_suite(
    config: SamplingConfig, model: SiT, vae: Autoencoder, device: torch.device, world: World
) -> EvaluationSuite | None:
    """Load the feature networks and return the suite, or None if no evaluation is requested."""
    output = config.output
    if output.evaluate is None:
        return None
    check_sample_count(output.num_fid_samples, "--num-fid-samples")
    resolution = model.config.latent_size * vae.downsampling_factor
    return EvaluationSuite(
        config.evaluation,
        output.evaluate,
        (resolution, resolution),
        output.per_proc_batch_size,
        device,
        world,
        flag="--evaluate",
    )


def sample_batches(
    worker: Worker, pending: list[int], config: SamplingConfig, world: World
) -> None:
    """Sample this process's share of the pending batches, with a progress bar."""
    compile_cache = make_compile_cache(config, worker, world)
    compile_cache.load()
    num_threads = max(1, world.cores // world.num_local_processes)
    if worker.device.type == "cuda":
        # Feature networks disable TF32 while they run, which affects all threads of the process.
        needs_single_thread = bool(worker.networks) and config.precision.allow_tf32
        num_threads = 1 if needs_single_thread else 2
    store = worker.store
    with ProgressBar(
        total=min(len(pending) * store.batch_size, store.count),
        unit="img",
        desc="sampling",
        disable=world.rank > 0 or not pending,
        smoothing=0.05,
    ) as bar:
        share = pending[world.rank :: world.num_processes]
        images_per_batch = store.batch_size * world.num_processes
        run_batches(
            worker,
            share,
            num_threads,
            config.precision.compile,
            bar,
            images_per_batch,
            compile_cache,
        )


def make_compile_cache(config: SamplingConfig, worker: Worker, world: World) -> CompileCache:
    """Return the compiled graphs of earlier runs with the same network, precision and batches."""
    sampler = config.sampler
    return CompileCache(
        choose_folder(config.output.sample_dir, config.precision.compile),
        {
            "model": asdict(worker.model.config),
            **asdict(config.precision),
            "batch_size": config.output.per_proc_batch_size,
            "guidance": [sampler.cfg_scale, sampler.guidance_low, sampler.guidance_high],
        },
        worker.device,
        world.rank,
        world.local_rank,
    )


def build_metrics_identity(suite: EvaluationSuite, store: SampleStore) -> JsonObject:
    """Return all entries of metrics.json except the results."""
    samples = store.npz_path if store.is_complete() else None
    return suite.build_identity(samples, store.record, store.count)


def read_metrics(suite: EvaluationSuite, store: SampleStore) -> JsonObject:
    """Return the stored metrics.json of these samples, or {} if they have not been evaluated.

    Raises:
        UserError: The file belongs to another evaluation.
    """
    # Hash the samples only if there is a file to compare with.
    if not store.metrics_path.exists():
        return {}
    return read_result(store.metrics_path, build_metrics_identity(suite, store))


def format_outcome(store: SampleStore, result: JsonObject, has_new_images: bool) -> str:
    """Return the final message: the files, and the metrics if the samples were evaluated."""
    if not store.keep_images:
        text = f"{store.count:,} images were sampled and discarded; image grid: {store.grid_path}"
    elif has_new_images:
        text = f"{store.npz_path}: {store.count:,} images; image grid: {store.grid_path}"
    else:
        text = f"{store.npz_path} is complete: {store.count:,} images"
    if result:
        text += f"\n{format_results(result)}\n  written to {store.metrics_path}"
    return text


if __name__ == "__main__":
    cli.run(main)

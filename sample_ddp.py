"""Samples images from a checkpoint into ADM's .npz, on one process or many, and measures them if asked.

    torchrun --nproc_per_node 8 sample_ddp.py --ckpt exps/sit-xl2-sra2 --num-fid-samples 50000

An image depends on the checkpoint, these flags and its index alone, not on how many processes or what came before. Each
batch is a file of its own until all are there, so an interrupted run goes on where it stopped.
"""

import argparse
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpointing import pretrained
from checkpointing.official import ORIGINS
from checkpointing.storage import CheckpointError
from common import cli
from common.cli import UserError
from common.config import add_flags, read_flags
from common.files import sha256
from common.processes import World
from evaluations.suite import (
    EvaluationConfig,
    EvaluationSuite,
    build_identity,
    check_sample_count,
    drop_results,
    format_results,
    read_result,
    write_result,
)
from interpolant import INTERPOLANTS
from models.autoencoder import Autoencoder
from models.sit import PRESETS, SiT, SiTBlock, SiTConfig
from sampling.recipe import STATE_DTYPES, Recipe, cast_matmul_weights
from sampling.store import SampleStore, StoredBatches


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, "sample_ddp.py", "--ckpt PATH")

    add = parser.add_argument_group("model").add_argument
    add(
        "--ckpt",
        type=Path,
        required=True,
        help="a run (exps/NAME: its newest checkpoint), one checkpoint of it, an ema.safetensors, what checkpointing.export "
        "wrote, or a .pt of the SiT, REPA or SRA repositories",
    )
    add(
        "--ema-decay",
        type=cli.decay,
        help="which average, of a run that keeps several (default: its first)",
    )
    add(
        "--model",
        choices=PRESETS,
        metavar="NAME",
        help="of a .pt alone: its architecture, like SiT-XL/2",
    )
    add("--origin", choices=ORIGINS, help="of a .pt that does not tell: the repository it is from")
    add(
        "--path-type",
        choices=sorted(INTERPOLANTS),
        help="of a .pt that does not tell: the path it was trained on",
    )
    add(
        "--vae",
        help="hub id or folder of the decoder (default: the one that made the training latents)",
    )

    add = parser.add_argument_group("what to sample").add_argument
    add("--num-fid-samples", type=cli.positive_int, default=50_000, help="images")
    add(
        "--labels",
        default="random",
        help="random: drawn uniformly; balanced: as many of each; a class, like 207; or a file of one for each image (.txt, "
        ".npy, .json, or another .npz of samples)",
    )
    add(
        "--global-seed",
        type=cli.seed,
        default=0,
        help="with an image's index, decides its noise and its class",
    )

    add = parser.add_argument_group("sampler").add_argument
    add(
        "--mode",
        choices=("sde", "ode"),
        default="sde",
        help="Euler-Maruyama, or the probability-flow ODE by Euler",
    )
    add("--heun", action="store_true", help="ODE by Heun's method instead of Euler's")
    add(
        "--dopri5",
        action="store_true",
        help="ODE with steps that adapt to each image, instead of --num-steps",
    )
    add("--num-steps", type=cli.positive_int, default=250, help="steps from noise to data")
    add("--atol", type=cli.positive_float, default=1e-6, help="absolute tolerance of --dopri5")
    add("--rtol", type=cli.non_negative_float, default=1e-3, help="relative tolerance of --dopri5")
    add(
        "--cfg-scale",
        type=cli.non_negative_float,
        default=1.0,
        help="classifier-free guidance; 1 is none",
    )
    add(
        "--guidance-low",
        type=cli.fraction,
        default=0.0,
        help="guide only for t at or above this (0 is data)",
    )
    add(
        "--guidance-high",
        type=cli.fraction,
        default=1.0,
        help="guide only for t at or below this (1 is noise)",
    )

    add = parser.add_argument_group("arithmetic").add_argument
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="of the network's products")
    add(
        "--allow-tf32",
        action="store_true",
        help="TF32 for float32 matrix products and convolutions on GPUs",
    )
    add(
        "--state-dtype",
        choices=sorted(STATE_DTYPES),
        default="float32",
        help="of the image between two steps (REPA: float64)",
    )
    add("--compile", action="store_true", help="compile the network's blocks")

    add = parser.add_argument_group("work and files").add_argument
    add("--per-proc-batch-size", type=cli.positive_int, default=32, help="images made at once")
    add(
        "--sample-dir",
        type=Path,
        default=Path("samples"),
        help="where NAME.npz, NAME.json and NAME.png go",
    )
    add(
        "--name",
        help="name of the files (default: made of the run, the step and the sampler's flags)",
    )
    add("--png", action="store_true", help="also write each image to NAME/INDEX.png")
    add(
        "--no-npz",
        action="store_true",
        help="with --evaluate: keep only the picture and the numbers",
    )

    group = parser.add_argument_group("evaluation")
    add = group.add_argument
    add(
        "--evaluate",
        type=Path,
        help="a reference to compare with, as evaluations.evaluate --reference takes it",
    )
    add_flags(group, EvaluationConfig)

    args = parser.parse_args(argv)
    if args.no_npz and not args.evaluate:
        raise UserError("--no-npz keeps nothing of the samples: add --evaluate PATH")
    return args


def make_recipe(args: argparse.Namespace) -> Recipe:
    """What the flags say of sampling. Raises UserError."""
    recipe = Recipe(
        args.mode,
        args.heun,
        args.dopri5,
        args.num_steps,
        args.atol,
        args.rtol,
        args.cfg_scale,
        args.guidance_low,
        args.guidance_high,
        args.labels,
        args.global_seed,
        state_dtype=args.state_dtype,
    )
    recipe.validate()
    return recipe


def build_record(
    args: argparse.Namespace,
    source: pretrained.PretrainedModel,
    vae: Autoencoder,
    recipe: Recipe,
    device,
) -> dict:
    """All that decides what the images are: NAME.json, and what evaluation copies into metrics.json."""
    given, adaptive = Path(recipe.labels), recipe.dopri5
    return {
        **source.identity,
        "path_type": recipe.path_type,
        "prediction": recipe.prediction,
        "mode": recipe.mode,
        "solver": recipe.solver,
        "num_steps": None if adaptive else recipe.num_steps,
        "atol": recipe.atol if adaptive else None,
        "rtol": recipe.rtol if adaptive else None,
        "cfg_scale": recipe.cfg_scale,
        "guidance_low": recipe.guidance_low,
        "guidance_high": recipe.guidance_high,
        "labels": recipe.labels,
        "labels_sha256": sha256(given) if recipe.explicit_labels is not None else None,
        "global_seed": recipe.seed,
        "count": args.num_fid_samples,
        "per_proc_batch_size": args.per_proc_batch_size,
        "vae": vae.name,
        "vae_fingerprint": vae.fingerprint(),
        "mixed_precision": args.mixed_precision,
        "allow_tf32": args.allow_tf32,
        "state_dtype": recipe.state_dtype,
        "compile": args.compile,
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        },
        "class_names": source.class_names,
    }


def default_name(
    args: argparse.Namespace, source: pretrained.PretrainedModel, recipe: Recipe
) -> str:
    """run-step-solver-guidance-labels-seed."""
    steps = "" if recipe.dopri5 else recipe.num_steps
    guidance = f"-cfg{recipe.cfg_scale:g}" if recipe.cfg_scale > 1 else ""
    if guidance and (recipe.guidance_low, recipe.guidance_high) != (0, 1):
        guidance += f"-from{recipe.guidance_low:g}-to{recipe.guidance_high:g}"
    labels = {"random": "", "balanced": "-balanced"}.get(recipe.labels)
    if labels is None:
        labels = (
            f"-class{recipe.labels}"
            if recipe.explicit_labels is None
            else f"-labels{sha256(Path(recipe.labels))[:8]}"
        )
    return f"{source.name}-{recipe.solver}{steps}{guidance}{labels}-seed{recipe.seed}"


class Stopped(Exception):
    """Another batch failed, or somebody pressed Ctrl-C."""


class Worker:
    """Makes batches, from their number to their file; called by several threads, each with a batch of its own."""

    def __init__(
        self,
        model: SiT,
        vae: Autoencoder,
        recipe: Recipe,
        dtype: torch.dtype,
        store: SampleStore,
        done: StoredBatches,
        networks: dict[str, torch.nn.Module],
        device: torch.device,
    ):
        self.model, self.vae, self.recipe, self.dtype, self.store, self.done = (
            model,
            vae,
            recipe,
            dtype,
            store,
            done,
        )
        self.networks, self.device, self.stop, self.local = (
            networks,
            device,
            threading.Event(),
            threading.local(),
        )

    def check(self) -> None:
        """Raises Stopped when `stop` is set."""
        if self.stop.is_set():
            raise Stopped

    def __call__(self, k: int) -> None:
        """Batch k: samples and decodes it if it is not stored yet, asks the networks that have not seen it, writes it."""
        self.check()
        fresh = k not in self.done.images
        with self._stream():
            if fresh:
                images = self._sample(k)
            else:
                stored = torch.from_numpy(self.store.images(k)).to(self.device)
                images = stored.permute(0, 3, 1, 2).contiguous()
            features = {}
            if k not in self.done.features:
                features = {
                    name: network(images).map(_host) for name, network in self.networks.items()
                }
            images = _host(images.permute(0, 2, 3, 1))
        self.store.write(k, images, features, fresh)

    def _sample(self, k: int) -> Tensor:
        """The last batch is padded with the numbers that follow: every batch runs the same kernels."""
        size = self.store.size
        index = torch.arange(k * size, (k + 1) * size, device=self.device)
        latents = self.recipe.sample_latents(self.model, index, self.dtype, self.check)
        if not latents.isfinite().all():
            raise UserError(
                f"--ckpt {self.store.what['checkpoint']}: the network's latents of batch {k} are not finite"
            )
        return self.vae.decode(latents)

    def _stream(self):
        """Each thread's own on a GPU, so that one samples while the other decodes, copies and writes."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self.local, "stream"):
            torch.cuda.set_device(self.device)
            self.local.stream = torch.cuda.Stream()
            self.local.stream.wait_stream(torch.cuda.default_stream())  # on which the weights came
        return torch.cuda.stream(self.local.stream)


def _host(tensor: Tensor):
    return tensor.cpu().numpy()


def run_batches(
    worker: Worker, mine: list[int], threads: int, warm_up: bool, bar: tqdm, images: int
) -> None:
    """All batches of this process; `images` go to the bar with each."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            if warm_up and mine:  # compiles once, not in every thread
                pool.submit(worker, mine[0]).result()
                bar.update(min(images, bar.total - bar.n))
                mine = mine[1:]
            for future in as_completed([pool.submit(worker, k) for k in mine]):
                future.result()
                bar.update(min(images, bar.total - bar.n))  # the last batch is padded
        except BaseException:
            worker.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    args = parse_args()
    recipe = make_recipe(args)
    world = World()
    device = world.select_device()
    cuda = device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    if not cuda:
        torch.set_num_threads(
            1
        )  # a sum's order, and so its last bit, depends on how many share it: threads take whole batches
    try:
        path = world.run_on_first_rank(
            lambda: pretrained.resolve_checkpoint(args.ckpt)
        )  # a run that goes on may save another one meanwhile
        source = pretrained.load(path, args.ema_decay, args.model, args.origin, args.path_type)
        vae = Autoencoder(args.vae or source.vae, device)
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(
            f"--ckpt {args.ckpt}: {error}" if isinstance(error, CheckpointError) else str(error)
        ) from None
    model = source.model.to(device)
    recipe = recipe._replace(path_type=source.path_type, prediction=source.prediction)
    recipe = recipe.with_loaded_labels(model.config.num_classes, args.num_fid_samples)
    what = build_record(args, source, vae, recipe, device)
    check_vae(vae, what["vae_fingerprint"], source, model.config)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
    cast_matmul_weights(model, dtype)
    if args.compile:
        for module in model.modules():
            if isinstance(module, SiTBlock):
                module.compile()

    name = args.name or default_name(args, source, recipe)
    suite = None
    if args.evaluate:
        side = model.config.latent_size * vae.downsampling_factor
        size = args.per_proc_batch_size
        check_sample_count(args.num_fid_samples, "--num-fid-samples")
        config = read_flags(EvaluationConfig, args)
        suite = EvaluationSuite(
            config, args.evaluate, (side, side), size, device, world, flag="--evaluate"
        )
    networks = suite.networks if suite else {}
    seen_by = {key: network.weights_sha256 for key, network in networks.items()}
    store = SampleStore(args.sample_dir, name, what, seen_by, not args.no_npz, args.png)
    labels = recipe.compute_labels(
        torch.arange(args.num_fid_samples), model.config.num_classes
    ).numpy()
    store.choose_grid_images(labels)
    with ExitStack() as held:
        done = world.run_on_first_rank(lambda: store.claim(held))
        store.open()
        if suite and world.run_on_first_rank(lambda: bool(evaluated(store, suite))):
            done = done._replace(features=set(store.batches))
        elif suite:
            suite.load_reference()
        to_do = store.pending_batches(done)
        mine = to_do[world.rank :: world.num_processes]
        worker = Worker(model, vae, recipe, dtype, store, done, networks, device)
        threads = max(1, world.cores // world.num_local_processes)
        if cuda:
            threads = (
                1 if suite and args.allow_tf32 else 2
            )  # networks switch TF32 off, in all threads at once
        size = args.per_proc_batch_size
        total, quiet = min(len(to_do) * size, args.num_fid_samples), world.rank > 0 or not to_do
        with tqdm(total=total, unit="img", desc="sampling", disable=quiet, smoothing=0.05) as bar:
            run_batches(worker, mine, threads, args.compile, bar, size * world.num_processes)
        world.barrier()
        if world.rank == 0:
            finish(args, store, suite, labels, made=bool(to_do))
    world.close()


def check_vae(
    vae: Autoencoder, fingerprint: str, source: pretrained.PretrainedModel, config: SiTConfig
) -> None:
    """Raises UserError for another decoder than the training latents' own, as far as that is known."""
    if source.vae_fingerprint not in (None, fingerprint):
        raise UserError(
            f"--vae {vae.name} is not the one that made the training latents ({source.vae}): its weights differ"
        )
    if vae.channels != config.channels:
        raise UserError(
            f"--vae {vae.name} decodes {vae.channels} channels, the model makes {config.channels}"
        )


def evaluated(store: SampleStore, suite: EvaluationSuite) -> dict:
    """The metrics.json of just these samples, or {}. Raises UserError if there is one of another evaluation."""
    if not store.metrics.exists():
        return {}
    who = build_identity(
        suite, store.npz_path if store.complete() else None, store.what, store.count
    )
    old = read_result(store.metrics, who)
    return old if drop_results(old) == who else {}


def finish(
    args: argparse.Namespace, store: SampleStore, suite: EvaluationSuite | None, labels, made: bool
) -> None:
    """By the first process, when every batch is there: the files, the numbers, a word on the screen."""
    store.finalize(labels)
    result = None
    if suite:
        result = evaluated(store, suite)
        if not result:
            who = build_identity(
                suite, store.npz_path if store.keep_images else None, store.what, store.count
            )
            result = {**suite.compute_results(store.all_features(), labels), **who}
            write_result(store.metrics, result)
    store.remove_parts()
    if args.no_npz:
        print(f"{store.count:,} images, not kept; look at {store.png_grid}")
    elif made:
        print(f"{store.npz_path}: {store.count:,} images; look at {store.png_grid}")
    else:
        print(f"{store.npz_path} is complete: {store.count:,} images")
    if result:
        print(f"{format_results(result)}\n  written to {store.metrics}")


if __name__ == "__main__":
    cli.run(main)

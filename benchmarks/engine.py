"""How fast the query engine is: against a loop that asks one question at a time, and against bare forwards.

    python benchmarks/engine.py                                  # the demo's model and data, on the CPU
    python benchmarks/engine.py --checkpoint outputs/demo/model/best.ckpt
    python benchmarks/engine.py --model concat                   # or another small one of conf/model
    python benchmarks/engine.py --model clip --device cuda --precision bf16      # or vilt, mmbt_full: random weights
    python benchmarks/engine.py --sequential-samples 0 --attacks decoupling --reuse on    # some attacks alone
    python benchmarks/engine.py --model vilt --device cuda --precision bf16 --processes 4  # several on one GPU
    python benchmarks/engine.py --model nothing --attacks decoupling --reuse on --sequential-samples 0 \\
        --memory --batch-sizes 64 --search-processes 2                       # its searches in two processes more
    python benchmarks/engine.py --model nothing --side 384 --samples 8 --batch-sizes 8 --max-queries 150 \\
        --sequential-samples 0 --attacks decoupling --reuse on --memory     # what a search costs without a model

*Overhead* is the share of the time that the same encodings and fusions would not take in full batches alone, *core ms*
what a forward takes of the cores of the engine's own process: what feeding a GPU takes; on a CPU, the model is in it.

All figures come from one run on the same samples and model; compare them with each other, not across machines. Bare
forwards are timed in between, every half second of whatever is held against them: the pace of a machine changes.
Without `keep_freed_memory` they are a fifth to a third slower in some processes, which would flatter the engine.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import muroan.device_store
from muroan.attacks.base import Ask, Attack, AttackedSample, Response, ThreatModel
from muroan.attacks.decoupling import Decoupling
from muroan.attacks.decoupling_reference import DecouplingReference
from muroan.attacks.greedy_occlusion import GreedyOcclusion
from muroan.attacks.random_removal import RandomRemoval
from muroan.attacks.saliency_removal import SaliencyRemoval
from muroan.data.samples import Batch, Sample
from muroan.engine import AUTOCAST, QueryEngine
from muroan.modalities import Image, Modality, Removal, Text, WordTokenizer
from muroan.models.base import MultimodalModel
from muroan.results import AttackResult

SMALL = ["mmbt", "cross_attention", "concat", "late_fusion"]
MADE_UP = ["mmbt_full", "vilt", "clip", "nothing"]  # random weights, noise images


def small_model(name: str, checkpoint: str | None, samples: int) -> tuple[MultimodalModel, list[Sample]]:
    """A model of conf/model on easy-VQA; without a checkpoint, with random weights, whose answers become the labels."""
    from muroan.data.easy_vqa import EasyVQA
    from muroan.models.encoders import ConvTokens, ConvTransformer, WordEmbedding, WordTransformer
    from muroan.models.fusion.concat import ConcatFusion
    from muroan.models.fusion.cross_attention import CrossAttentionFusion
    from muroan.models.fusion.late_fusion import LateFusion
    from muroan.models.fusion.mmbt import MMBTFusion
    from muroan.models.fusion_model import FusionModel
    from muroan.models.heads import LinearHead, MLPHead, SumHead
    from muroan.training.module import load_weights

    data = EasyVQA(test_limit=samples)
    light = {"image": partial(ConvTokens, width=128, grid=(4, 4)), "text": partial(WordEmbedding, width=128)}
    readers = {
        "image": partial(ConvTransformer, width=128, grid=(4, 4), layers=2, heads=4),
        "text": partial(WordTransformer, width=128, layers=2, heads=4),
    }
    parts = {
        "mmbt": (light, partial(MMBTFusion, width=128, layers=3, heads=4), LinearHead),
        "cross_attention": (light, partial(CrossAttentionFusion, width=128, layers=2, heads=4), MLPHead),
        "concat": (readers, ConcatFusion, MLPHead),
        "late_fusion": (readers, LateFusion, SumHead),
    }
    torch.manual_seed(0)
    model = FusionModel(data.modalities(), len(data.classes), *parts[name]).eval()
    if checkpoint:
        load_weights(model, Path(checkpoint))
    return model, [s for s in data.prepared("test") if isinstance(s, Sample)]


class Nothing(MultimodalModel):
    """Next to no model: averages of the picture and the words, and a margin that no removal gets over."""

    def __init__(self, modalities: Mapping[str, Modality], num_classes: int):
        super().__init__(modalities, num_classes)
        text = modalities["text"]
        assert isinstance(text, Text)
        self.words, self.patches = nn.Embedding(text.tokenizer.size, 16), nn.Linear(3 * 49, 16)
        self.classifier = nn.Linear(16, num_classes)
        self.classifier.bias.data[0] += 10

    def encode(self, modality: str, x: torch.Tensor) -> torch.Tensor:
        if modality == "text":
            return self.words(x).mean(1)
        return self.patches(nn.functional.adaptive_avg_pool2d(x, 7).flatten(1))

    def fuse(self, features: dict[str, Any]) -> torch.Tensor:
        return torch.tanh(features["image"] + features["text"])

    def head(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.classifier(embedding)


def made_up_model(name: str, samples: int, side: int) -> tuple[MultimodalModel, list[Sample]]:
    """A model in full size, or none, with random weights on noise images and words: speed does not depend on them."""
    from muroan.data.samples import Example, PreparedDataset
    from muroan.models.huggingface import Clip, Vilt
    from muroan.models.mmbt_full import MMBTFull

    torch.manual_seed(0)
    words = [f"w{i}" for i in range(2000)]
    modalities = {"image": Image((side, side)), "text": Text(WordTokenizer(words), 32)}
    if name == "nothing":
        model: MultimodalModel = Nothing(modalities, 2).eval()
    elif name == "mmbt_full":
        model = MMBTFull(modalities, 2, bert={}, resnet={}, size=(side, side), max_length=32).eval()
    else:
        kind = {"vilt": Vilt, "clip": Clip}[name]
        with TemporaryDirectory() as folder:
            save_checkpoint(name, Path(folder), words)
            model = kind(modalities, 2, folder, max_length={"vilt": 32, "clip": None}[name]).eval()  # 77 tokens
    rng = np.random.default_rng(0)
    examples = [
        Example(
            str(i),
            {
                "image": rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
                "text": " ".join(rng.choice(words, 12)),
            },
            0,
        )
        for i in range(samples)
    ]
    return model, [s for s in PreparedDataset(examples, model.modalities, 2) if isinstance(s, Sample)]


def save_checkpoint(name: str, folder: Path, words: list[str]) -> None:
    """A checkpoint of ViLT-B/32 or CLIP ViT-B/32 with random weights and a tokenizer of these words."""
    from transformers import BertTokenizerFast, CLIPConfig, CLIPModel, ViltConfig, ViltForQuestionAnswering

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    if name == "vilt":
        ViltForQuestionAnswering(ViltConfig(num_labels=2)).save_pretrained(folder)
    else:
        text = {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        CLIPModel(CLIPConfig(text_config=text)).save_pretrained(folder)
    numbers = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))


def model_of(arguments: argparse.Namespace) -> tuple[MultimodalModel, list[Sample]]:
    """The model on its device, and samples; without a checkpoint, its own answers are the labels: none is skipped."""
    device = torch.device(arguments.device)
    if arguments.model in MADE_UP:
        model, samples = made_up_model(arguments.model, arguments.samples, arguments.side)
    else:
        model, samples = small_model(arguments.model, arguments.checkpoint, arguments.samples)
    model = model.to(device)
    return model, samples if arguments.checkpoint else relabel(model, samples, device, arguments.precision)


def narrowed(device: torch.device, precision: str) -> torch.autocast:
    """What the engine runs a model in, so that all that is compared with it runs in the same."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def relabel(model: MultimodalModel, samples: list[Sample], device: torch.device, precision: str) -> list[Sample]:
    """The samples with the model's own predictions as labels, so that none is skipped."""
    labelled = []
    for start in range(0, len(samples), 64):
        batch = Batch.of(samples[start : start + 64]).to(device)
        with torch.inference_mode(), narrowed(device, precision):
            labels = model(batch.inputs, batch.rows).logits.argmax(1).tolist()
        labelled += [replace(s, label=label) for s, label in zip(batch.samples, labels, strict=True)]
    return labelled


def sequential(
    model: MultimodalModel, attack: Attack, samples: list[Sample], device: torch.device, precision: str
) -> int:
    """The plain loop: one forward a question, no cache, no reuse. Returns the forwards."""
    threat_model = ThreatModel().complete(model.modalities)
    forwards = 0

    @torch.inference_mode()
    def ask(sample: Sample, removal: Removal, clean: torch.Tensor | None) -> tuple[Response, torch.Tensor]:
        nonlocal forwards
        forwards += 1
        inputs = {}
        for name, modality in model.modalities.items():
            x = sample.inputs[name][None].to(device)
            boxes = [modality.box(r, sample.layouts[name]) for r in removal.regions if r.modality == name]
            if boxes:
                where = torch.tensor([boxes], device=device)
                x = modality.occlude(x, where, threat_model.replacement[name], None)
            inputs[name] = x
        with narrowed(device, precision):
            embedding, logits = (t[0].float() for t in model(inputs))
        other = logits.clone()
        other[sample.label] = float("-inf")
        shift = 0.0 if clean is None else 1 - float(torch.cosine_similarity(embedding, clean, dim=0))
        margin = float(logits[sample.label] - other.max())
        response = Response(int(logits.argmax()), margin, int(embedding.argmax()), shift, logits.cpu().numpy())
        return response, embedding

    for sample in samples:
        clean, embedding = ask(sample, Removal(), None)
        view = AttackedSample(
            sample.id,
            sample.label,
            clean,
            model.modalities,
            sample.layouts,
            threat_model,
            np.random.default_rng(0),
        )
        search = attack.search(view)
        asked = next(search)
        try:
            while True:
                question = asked if isinstance(asked, Ask) else Ask(asked)
                responses = []
                for removal in question.removals:
                    responses.append(ask(sample, removal, embedding)[0])
                    if question.until is not None and question.until(responses[-1]):
                        break
                asked = search.send(responses)
        except StopIteration:
            pass
    return forwards


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, object]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


Pieces = dict[str, Callable[[], object]]


def pieces(model: MultimodalModel, samples: list[Sample], size: int, precision: str) -> Pieces:
    """A full batch through the whole model, through the encoder of each modality, and through what comes after.

    Returns:
        `whole`, the names of the modalities, and `after`: what runs each.
    """
    device = next(model.parameters()).device
    batch = Batch.of([samples[i % len(samples)] for i in range(size)]).to(device)
    inputs = {name: x[batch.rows[name]] for name, x in batch.inputs.items()}  # every row its own, as in a query

    def ready(work: Callable[[], torch.Tensor | Any]) -> Callable[[], object]:
        def run() -> None:
            with torch.inference_mode(), narrowed(device, precision):
                work()

        return run

    with torch.inference_mode(), narrowed(device, precision):
        features = {name: model.encode(name, x) for name, x in inputs.items()}
    work = {"whole": lambda: model(inputs).logits.cpu(), "after": lambda: model.head(model.fuse(features))}
    work |= {name: partial(model.encode, name, x) for name, x in inputs.items()}
    return {name: ready(run) for name, run in work.items()}


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """What one run takes, of as many as fit into so many seconds."""
    once = min(timed(work, device)[0] for _ in range(3))
    repeats = max(3, int(seconds / max(once, 1e-5)))
    return timed(lambda: [work() for _ in range(repeats)], device)[0] / repeats


def bare_forwards(model: MultimodalModel, samples: list[Sample], size: int, seconds: float, precision: str) -> float:
    """Whole forwards a second at one batch size, on inputs that lie on the device already."""
    device = next(model.parameters()).device
    return size / seconds_of(pieces(model, samples, size, precision)["whole"], device, seconds)


REMOVAL_ATTACKS: dict[str, Callable[[], Attack]] = {
    "decoupling": Decoupling,
    "decoupling_reference": DecouplingReference,
    "random_removal": RandomRemoval,
    "greedy_occlusion": GreedyOcclusion,
    "saliency_removal": SaliencyRemoval,
}


@dataclass
class Beside:
    """What an engine did, and what its model alone took in between.

    Attributes:
        seconds: that the engine took, without what ran in between; results: what it found.
        core: likewise, seconds of this process's cores.
        alone: seconds a row that each of the `pieces` took in full batches.
    """

    seconds: float
    core: float
    results: list[AttackResult]
    alone: dict[str, float]

    @property
    def bare(self) -> float:
        """Whole forwards a second."""
        return 1 / self.alone["whole"]


def beside_bare(engine: QueryEngine, samples: list[Sample]) -> Beside:
    """Run an engine, and every half second of its own each of its model's pieces: machines change their pace.

    Searches in other processes would go on meanwhile: with these, the pieces run before and after.
    """
    work = pieces(engine.model, samples, engine.batch_size, engine.precision)
    times: defaultdict[str, list[float]] = defaultdict(list)
    send, since, between, between_core = engine._send, time.perf_counter(), 0.0, 0.0

    def measure() -> None:
        nonlocal between, between_core, since
        if engine.device.type == "cuda":
            torch.cuda.synchronize()  # what the engine has under way is its own
        start, core = time.perf_counter(), time.process_time()
        for name, run in work.items():
            run()  # until what it needs is near again
            times[name].append(timed(run, engine.device)[0])
        since = time.perf_counter()
        between, between_core = between + since - start, between_core + time.process_time() - core

    def sent(questions: list) -> Any:
        if time.perf_counter() - since > 0.5:
            measure()
        return send(questions)

    around = 10 if engine.search_processes else 1
    for _ in range(around):
        measure()
    between, between_core, core = 0.0, 0.0, time.process_time()
    with nullcontext() if engine.search_processes else patch.object(engine, "_send", sent):
        total, results = timed(lambda: list(engine.run(samples)), engine.device)
    seconds, core = total - between, time.process_time() - core - between_core
    for _ in range(around):
        measure()
    alone = {name: sum(own) / len(own) / engine.batch_size for name, own in times.items()}
    return Beside(seconds, core, results, alone)  # type: ignore[arg-type]


def parts(model: MultimodalModel, samples: list[Sample], size: int, precision: str) -> dict[str, float]:
    """Seconds a row that encoding each modality takes, and what comes after, in full batches and nothing else."""
    device = next(model.parameters()).device
    work = pieces(model, samples, size, precision)
    return {name: seconds_of(run, device, 0.5) / size for name, run in work.items() if name != "whole"}


def alone(engine: QueryEngine, seconds: dict[str, float]) -> float:
    """Seconds that what an engine has run would take in full batches and without anything else."""
    return seconds["after"] * engine.statistics.rows + sum(seconds[m] * n for m, n in engine.statistics.encoded.items())


# What is encoded once alone: nothing, whole inputs, or what removals leave of them, too.
REUSE = {"on": (True, muroan.device_store.BATCHES), "whole": (True, 0), "off": (False, 0)}


def beside_loop(arguments: argparse.Namespace, model: MultimodalModel, samples: list[Sample], size: int) -> dict:
    """The engine against a loop and bare forwards, with the released attack and no budget."""
    device, precision, attack = next(model.parameters()).device, arguments.precision, DecouplingReference()
    few = samples[: arguments.sequential_samples]
    seconds, forwards = timed(lambda: sequential(model, attack, few, device, precision), device)
    loop = float(forwards) / seconds  # type: ignore[arg-type]
    print(f"sequential loop: {loop:.0f} queries/s ({forwards} on {len(few)} samples)")
    ratios = {}
    for reuse in (True, False):
        engine = QueryEngine(model, attack, None, size, precision, keep_media=0, reuse_features=reuse)
        beside = beside_bare(engine, samples)
        seconds, results, bare = beside.seconds, beside.results, beside.bare
        asked = sum(r.queries + r.cache_hits for r in results)
        hits, rows = sum(r.cache_hits for r in results), engine.statistics.rows
        encoded = ", ".join(f"{100 * (1 - n / rows):.0f} % of {m}" for m, n in engine.statistics.encoded.items())
        wasted = rows - engine.statistics.repeated - sum(r.forwards for r in results)
        print(
            f"engine, feature reuse {'on' if reuse else 'off'}, batch {size}: {asked / seconds:.0f} queries/s, "
            f"{rows / seconds:.0f} forwards/s beside {bare:.0f} bare ones; {asked} queries, {rows} forwards in "
            f"{engine.statistics.batches} batches; saved by the cache: {100 * hits / asked:.0f} % of the queries; "
            f"encodings saved: {encoded}; {engine.statistics.repeated} forwards to see that the model repeats itself, "
            f"{wasted} run ahead in vain"
        )
        ratios[f"engine forwards / bare forwards{'' if reuse else ', no feature reuse'}"] = rows / seconds / bare
        if reuse:
            ratios["engine queries / sequential queries"] = asked / seconds / loop
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.2f}")
    return ratios


def engine_of(arguments: argparse.Namespace, model: MultimodalModel, attack: str, size: int, reuse: str) -> QueryEngine:
    limit, removal = ThreatModel(max_queries=arguments.max_queries), REMOVAL_ATTACKS[attack]()
    options = {"keep_media": 0, "reuse_features": REUSE[reuse][0], "search_processes": arguments.search_processes}
    return QueryEngine(model, removal, limit, size, arguments.precision, **options)


def by_attack(arguments: argparse.Namespace, model: MultimodalModel, samples: list[Sample], size: int) -> dict:
    """Forwards a second of each removal attack over bare forwards, what it encodes, and what else takes time."""
    ratios = {}
    print(f"{'attack':22s} {'reuse':5s} {'forwards/s':>10s} {'of bare':>8s} {'overhead':>9s} {'core ms':>8s}  encoded")
    for name, reuse in itertools.product(arguments.attacks, arguments.reuse):
        engine = engine_of(arguments, model, name, size, reuse)
        with patch.object(muroan.device_store, "BATCHES", REUSE[reuse][1]):
            beside = beside_bare(engine, samples)
        rate, rows = engine.statistics.rows / beside.seconds, engine.statistics.rows
        ratios[f"{name}, reuse {reuse}"] = rate / beside.bare
        overhead = 1 - alone(engine, beside.alone) / beside.seconds
        encoded = ", ".join(f"{100 * n / rows:.0f} % {m}" for m, n in engine.statistics.encoded.items())
        line = f"{name:22s} {reuse:5s} {rate:10.0f} {rate / beside.bare:8.2f} {100 * overhead:7.0f} %"
        print(f"{line} {1e3 * beside.core / rows:8.3f}  {encoded}", flush=True)
    return ratios


def beside_each_other(arguments: argparse.Namespace, model: MultimodalModel, samples: list[Sample], size: int) -> dict:
    """The same by several processes on one device at once, as jobs of a sweep are, over bare forwards of one alone."""
    ratios = {}
    print(f"{'attack':22s} {'processes':>9s} {'forwards/s':>10s} {'of bare':>8s} {'overhead':>9s}")
    context = multiprocessing.get_context("spawn")
    for name, count in itertools.product(arguments.attacks, arguments.processes):
        seconds = parts(model, samples, size, arguments.precision)
        bare = bare_forwards(model, samples, size, 2.0, arguments.precision)
        ready, results = context.Barrier(count, timeout=300), context.Queue()
        given = (arguments, name, size, seconds, ready, results)
        work = [context.Process(target=one_of_several, args=given) for _ in range(count)]
        for process in work:
            process.start()
        for process in work:
            process.join()  # each has put little, so that none waits for it to be read
        if any(process.exitcode for process in work):
            raise SystemExit("a process failed, see above")
        starts, ends, rows, least = zip(*(results.get() for _ in work), strict=True)
        wall = max(ends) - min(starts)
        rate, overhead = sum(rows) / wall, 1 - sum(least) / wall
        ratios[f"{name}, {count} processes"] = rate / bare
        print(f"{name:22s} {count:9d} {rate:10.0f} {rate / bare:8.2f} {100 * overhead:7.0f} %", flush=True)
    return ratios


def one_of_several(
    arguments: argparse.Namespace, attack: str, size: int, seconds: dict[str, float], ready: Any, results: Any
) -> None:
    """What one process does: tells when it began and ended, its forwards, and the seconds that these take alone."""
    device = torch.device(arguments.device)
    model, samples = model_of(arguments)
    list(engine_of(arguments, model, "random_removal", size, "on").run(samples))  # until all is warm
    engine = engine_of(arguments, model, attack, size, "on")
    ready.wait()
    start = time.time()
    took, _ = timed(lambda: list(engine.run(samples)), device)
    results.put((start, start + took, engine.statistics.rows, alone(engine, seconds)))


def peak_memory(arguments: argparse.Namespace, samples: int) -> float:
    """Peak memory in MiB of a process of its own that attacks so many samples."""
    command = [sys.executable, __file__, "--memory-of", str(samples), "--model", arguments.model]
    command += ["--device", arguments.device, "--precision", arguments.precision, "--side", str(arguments.side)]
    command += ["--batch-sizes", *map(str, arguments.batch_sizes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory_of(arguments: argparse.Namespace) -> float:
    count, device = arguments.memory_of, torch.device(arguments.device)
    model, samples = model_of(arguments)
    engine = QueryEngine(model, RandomRemoval(draws=4), batch_size=arguments.batch_sizes[0], keep_media=0)
    stream = (replace(samples[i % len(samples)], id=str(i), index=i) for i in range(count))
    for _ in engine.run(stream):
        pass
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return most_memory()


def most_memory() -> float:
    """The most memory of the CPU's that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def keep_freed_memory() -> None:
    """Let glibc not give back what a forward frees, or in some processes bare ones ask the system for it each time."""
    if platform.libc_ver()[0] == "glibc":
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(option, 2**30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*SMALL, *MADE_UP], default="mmbt")
    parser.add_argument("--side", type=int, default=224, help="of the images of mmbt_full and nothing")
    parser.add_argument("--checkpoint")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32", choices=list(AUTOCAST))
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--sequential-samples", type=int, default=20, help="0 leaves the loop out")
    parser.add_argument("--attacks", nargs="+", choices=list(REMOVAL_ATTACKS), default=list(REMOVAL_ATTACKS))
    parser.add_argument("--reuse", nargs="*", choices=list(REUSE), default=list(REUSE))
    parser.add_argument("--processes", nargs="*", type=int, default=[], help="so many at once, on the same device")
    parser.add_argument("--search-processes", type=int, default=0, help="of each engine, besides its own")
    parser.add_argument("--max-queries", type=int, default=500)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--memory", type=int, nargs="*", default=[100, 1000, 5000])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments))
        return
    keep_freed_memory()
    device = torch.device(arguments.device)
    model, samples = model_of(arguments)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.model} on {name}, precision {arguments.precision}, torch {torch.__version__}, {platform.machine()}"
    )

    bare = {size: bare_forwards(model, samples, size, 3.0, arguments.precision) for size in arguments.batch_sizes}
    best = max(bare, key=lambda size: bare[size])
    print("bare forwards/s by batch size: " + ", ".join(f"{size}: {rate:.0f}" for size, rate in bare.items()))

    ratios = {} if arguments.sequential_samples == 0 else beside_loop(arguments, model, samples, best)
    ratios |= by_attack(arguments, model, samples, best) if arguments.reuse else {}
    print(f"memory of this process: {most_memory():.0f} MiB at most")
    ratios |= beside_each_other(arguments, model, samples, best) if arguments.processes else {}
    if arguments.memory:
        peaks = {count: peak_memory(arguments, count) for count in arguments.memory}
        print("peak memory, MiB, by samples: " + ", ".join(f"{n}: {mib:.0f}" for n, mib in peaks.items()))
        ratios["peak memory, most samples / fewest"] = peaks[max(peaks)] / peaks[min(peaks)]
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()

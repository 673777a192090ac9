"""Models: numbers worked out by hand, trusted references, and properties that every model must have."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from muroan import evaluate
from muroan.attacks.base import ThreatModel
from muroan.attacks.random_removal import RandomRemoval
from muroan.attacks.saliency_removal import SaliencyRemoval
from muroan.attacks.target import Target
from muroan.data.samples import Example, PreparedDataset, Sample
from muroan.errors import MuroanError
from muroan.modalities import Audio, Image, Text, WordTokenizer
from muroan.models.encoders import (
    AudioConv,
    AudioTransformer,
    ConvTokens,
    ConvTransformer,
    WordEmbedding,
    WordTransformer,
    mel_filters,
    pooling_matrix,
)
from muroan.models.fusion.base import masked_mean
from muroan.models.fusion.concat import ConcatFusion
from muroan.models.fusion.cross_attention import CrossAttentionFusion
from muroan.models.fusion.gated import GatedFusion
from muroan.models.fusion.late_fusion import LateFusion
from muroan.models.fusion.low_rank_fusion import LowRankFusion
from muroan.models.fusion.mmbt import MMBTFusion
from muroan.models.fusion.tensor_fusion import TensorFusion, outer_product
from muroan.models.fusion_model import FusionModel
from muroan.models.heads import MLPHead, SumHead
from muroan.models.transformer import Attention, Block

CONF = Path(__file__).parents[1] / "conf"
CLASSES = 3
TOKENIZER = WordTokenizer.from_texts(["is there a red circle in the picture ?"])
IMAGE, GREY = Image((64, 64)), Image((32, 32), (0.5,), (0.5,))
TEXT, AUDIO = Text(TOKENIZER, 12), Audio(2000, 4000)
MODALITIES = [
    {"image": IMAGE},
    {"text": TEXT},
    {"image": IMAGE, "text": TEXT},
    {"image": GREY, "audio": AUDIO},
    {"text": TEXT, "image": GREY, "audio": AUDIO},
]
TRANSFORMERS = {
    "image": partial(ConvTransformer, width=8, layers=1, heads=2, grid=(2, 2)),
    "text": partial(WordTransformer, width=8, layers=1, heads=2),
    "audio": partial(AudioTransformer, width=8, layers=1, heads=2, grid=(1, 3), bands=20),
}
ENCODERS = {
    "image": partial(ConvTokens, width=16, grid=(2, 2)),
    "text": partial(WordTransformer, width=8, layers=1, heads=2, dropout=0.3),
    "audio": partial(AudioConv, width=12, grid=(1, 3), bands=20),
}
FUSIONS = {
    "mmbt": partial(MMBTFusion, width=16, layers=2, heads=2, dropout=0.3),
    "late_fusion": partial(LateFusion, hidden=16, dropout=0.3),
    "concat": ConcatFusion,
    "gated": partial(GatedFusion, width=16),
    "tensor_fusion": partial(TensorFusion, factor=4),
    "low_rank_fusion": partial(LowRankFusion, factor=4, width=16, rank=2),
    "cross_attention": partial(CrossAttentionFusion, width=16, layers=2, heads=2, dropout=0.3),
}


def random_inputs(modalities, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, modality in modalities.items():
        if isinstance(modality, Text):
            sentences = ["is there a red circle ?", "circle", "a red picture in there"]
            inputs[name] = torch.stack([modality.prepare(sentences[i % 3])[0] for i in range(batch)])
        else:
            inputs[name] = torch.randn(batch, *modality.shape, generator=generator)
    return inputs


def build(modalities, fusion="mmbt", head=MLPHead, **encoders):
    torch.manual_seed(0)
    return FusionModel(modalities, CLASSES, ENCODERS | encoders, FUSIONS[fusion], head).eval()


def scramble(model, std=0.1):
    """Weights large enough that a wrong input shows in the output."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0, std)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------
# Parts


@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 4)), ((7, 5), (3, 2)), ((4, 9), (4, 1)), ((2, 3), (4, 4))])
def test_grid_pooling_is_adaptive_average_pooling(size, grid):
    x = torch.randn(2, 3, *size)
    rows, columns = (pooling_matrix(s, g) for s, g in zip(size, grid, strict=True))
    torch.testing.assert_close(rows @ x @ columns.T, F.adaptive_avg_pool2d(x, grid))


def test_mel_filters():
    # Up to 700 Hz the mel scale ends at 2595 log10(2); one band peaks where it has half of that, 700 (sqrt(2) - 1).
    filters = mel_filters(1, 701, 1400)
    assert filters.argmax().item() == 290  # 289.95 Hz
    assert filters[0, 0] == filters[0, 700] == 0
    assert filters[0, 145] == pytest.approx(145 / 289.949, abs=1e-5)
    assert filters[0, 495] == pytest.approx((700 - 495) / (700 - 289.949), abs=1e-5)


def test_audio_encoder_tells_tones_apart_by_band_and_time():
    encoder = AudioConv(Audio(4000, 8000), width=16).eval()
    time = torch.arange(4000) / 8000
    low, high = (0.5 * torch.sin(2 * torch.pi * f * time) for f in (200, 3000))
    seen = {}
    encoder.layers[0].register_forward_pre_hook(lambda _, args: seen.update(mel=args[0]))
    tokens, mask = encoder(torch.stack([low, high, torch.zeros(4000)]))
    assert tokens.shape == (3, 16, 16)
    assert mask.all()
    bands = seen["mel"][:, 0].mean(2).argmax(1)
    assert bands[0] < 10 < 30 < bands[1]
    torch.testing.assert_close(seen["mel"][2], torch.full_like(seen["mel"][2], -1))  # silence
    assert seen["mel"].max() < 2


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (28, 28), (20, 45)])
def test_image_encoder_takes_any_size(size):
    tokens, mask = ConvTokens(Image(size, (0.5,), (0.5,)), width=16)(torch.randn(2, 1, *size))
    assert tokens.shape == (2, 16, 16)
    assert mask.shape == (2, 16)
    assert mask.all()


@pytest.mark.parametrize("replacement", Image.replacements)
@pytest.mark.parametrize(
    ("kind", "picture"),
    [("plain", IMAGE), ("plain", GREY), ("contextual", IMAGE), ("contextual", GREY), ("full", IMAGE)],
    ids=["plain-colour", "plain-grey", "contextual-colour", "contextual-grey", "mmbt_full"],
)
def test_pictures_come_as_the_encoder_reads_them(kind, picture, replacement):
    """Nothing is turned around at every question, and no bit of what it makes of them differs for it."""
    if kind == "full":
        from muroan.models.mmbt_full import MMBTFull

        model = scramble(MMBTFull({"image": picture, "text": TEXT}, CLASSES, TINY_BERT, TINY_RESNET, size=(64, 64)))
        encoder = model.resnet
    else:
        encoders = {"plain": ENCODERS, "contextual": TRANSFORMERS}[kind]
        model = scramble(build({"image": picture, "text": TEXT}, "concat", **encoders))
        encoder = model.encoders["image"]
    inputs = random_inputs(model.modalities, 8)
    layouts = {"image": picture.prepare(np.zeros((4, 4, 3), np.uint8))[1]}
    texts = [TEXT.prepare(sentence)[1] for sentence in ("is there a red circle ?", "circle", "a red picture in there")]
    samples = [
        Sample(f"s{i}", i, {n: x[i] for n, x in inputs.items()}, {**layouts, "text": texts[i % 3]}, int(label))
        for i, label in enumerate(model(inputs).logits.argmax(1))
    ]
    seen = []
    encoder.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))

    def run():
        seen.clear()
        evaluate(model, samples, RandomRemoval(), threat_model=ThreatModel({"image": replacement}), batch_size=16)
        return seen.copy()

    assert list(model.channels_last) == ["image"]
    fast = run()
    model.channels_last = ()
    slow = run()
    assert len(fast) == len(slow) > 5
    for (x, tokens), (same_x, same_tokens) in zip(fast, slow, strict=True):
        assert x.stride(1) == 1
        assert x.movedim(1, -1).is_contiguous()
        assert same_x.stride(1) != 1
        assert torch.equal(x, same_x)
        assert torch.equal(tokens, same_tokens)


def test_masked_mean():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]], [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(tokens, mask).tolist() == [[2.0, 4.0], [0.0, 0.0]]


def test_attention_against_pytorch():
    ours, reference = Attention(8, 2).eval(), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    scramble(ours, 0.5)
    reference.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight]).data
    reference.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias]).data
    reference.out_proj.load_state_dict(ours.out.state_dict())
    x, context = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False, False, False, False, True]])
    expected, _ = reference(x, context, context, key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, context, mask), expected, atol=1e-5, rtol=1e-5)


def test_attention_to_nothing_sees_zeros():
    attention = scramble(Attention(8, 2))
    context = torch.randn(1, 5, 8, requires_grad=True)
    seen = attention(torch.randn(1, 4, 8), context, torch.zeros(1, 5, dtype=torch.bool))
    torch.testing.assert_close(seen, attention.out.bias.expand(1, 4, 8))
    seen.sum().backward()
    assert context.grad.abs().max() == 0


def test_block_computes_only_the_first_tokens():
    block, x = scramble(Block(8, 2)), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    torch.testing.assert_close(block(x, mask, first=2), block(x, mask)[:, :2])


def test_padding_does_not_reach_the_words():
    encoder = scramble(WordTransformer(TEXT, width=8, heads=2))
    ids, layout = TEXT.prepare("a red circle")
    end = layout.spans[-1][1] + 1
    tokens, mask = encoder(ids[None])
    assert mask[0].tolist() == [True] * end + [False] * (12 - end)
    torch.testing.assert_close(tokens[:, :end], encoder(ids[None, :end])[0])


# ---------------------------------------------------------------------------------------------------------
# Fusions by hand


def one_token(**vectors):
    return {name: (torch.tensor([[v]]), torch.ones(1, 1, dtype=torch.bool)) for name, v in vectors.items()}


def test_concat():
    fusion = ConcatFusion({"a": 2, "b": 1}, CLASSES)
    assert fusion(one_token(b=[3.0], a=[1.0, 2.0])).tolist() == [[1.0, 2.0, 3.0]]


def test_late_fusion_sums_unimodal_logits():
    fusion, head = scramble(LateFusion({"a": 2, "b": 1}, CLASSES)), SumHead(6, CLASSES)
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    expected = fusion.classifiers["a"](a) + fusion.classifiers["b"](b)
    embedding = fusion(one_token(a=[1.0, 2.0], b=[3.0]))
    assert embedding.shape == (1, 6)
    torch.testing.assert_close(head(embedding), expected)
    assert head(torch.tensor([[1.0, 2.0, 3.0, 10.0, 20.0, 30.0]])).tolist() == [[11.0, 22.0, 33.0]]


def test_gated_fusion():
    fusion = GatedFusion({"a": 1, "b": 1}, CLASSES, width=1)
    fusion.hidden["a"].weight.data.fill_(1.0)
    fusion.hidden["b"].weight.data.fill_(-1.0)
    fusion.gate.weight.data.copy_(torch.tensor([[0.5, 0.25]]))
    # g = sigmoid(0.5 * 1 + 0.25 * 2) = 0.731059; tanh(1) = 0.761594, tanh(-2) = -0.964028
    assert fusion(one_token(a=[1.0], b=[2.0])).item() == pytest.approx(
        0.731059 * 0.761594 - 0.268941 * 0.964028, abs=1e-5
    )


def test_gated_fusion_of_three_has_a_gate_each():
    fusion = GatedFusion({"a": 1, "b": 1, "c": 1}, CLASSES, width=1)
    for layer in (*fusion.hidden.values(), fusion.gate):
        layer.weight.data.fill_(1.0)
    # every gate is sigmoid(0.5 + 1 - 1.5) = 1/2; tanh of 0.5, 1 and -1.5 add up to 0.318563
    assert fusion(one_token(a=[0.5], b=[1.0], c=[-1.5])).item() == pytest.approx(0.318563 / 2, abs=1e-5)


def test_outer_product_of_three():
    a, b, c = (torch.tensor([[v]]) for v in (2.0, 3.0, 5.0))
    assert outer_product([a, b, c]).tolist() == [[1.0, 5.0, 3.0, 15.0, 2.0, 10.0, 6.0, 30.0]]


@pytest.mark.parametrize("widths", [{"a": 3}, {"a": 3, "b": 2}, {"a": 3, "b": 2, "c": 4}])
def test_low_rank_fusion_is_tensor_fusion_with_a_low_rank_weight(widths):
    low, full = LowRankFusion(widths, CLASSES, factor=3, width=5, rank=2), TensorFusion(widths, CLASSES, factor=3)
    full.project.load_state_dict(low.project.state_dict())
    low.bias.data.normal_()
    # W[d] = sum over r of the outer product over m of w_m^r[:, d]
    weight = torch.zeros(low.width, full.width)
    for d in range(low.width):
        for r in range(2):
            term = torch.ones(1)
            for factor in low.factors.values():
                term = torch.outer(term, factor[r, :, d]).flatten()
            weight[d] += term
    features = {name: (torch.randn(6, 2, d), torch.ones(6, 2, dtype=torch.bool)) for name, d in widths.items()}
    torch.testing.assert_close(low(features), F.linear(full(features), weight, low.bias), atol=1e-5, rtol=1e-4)


def test_mmbt_reads_all_tokens_and_no_padding():
    fusion = scramble(MMBTFusion({"a": 3, "b": 2}, CLASSES, width=8, layers=2, heads=2))
    a, b = torch.randn(1, 3, 3), torch.randn(1, 2, 2)
    real = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, False]])
    embedding = fusion({"a": (a, real[0]), "b": (b, real[1])})
    torch.testing.assert_close(embedding, fusion({"a": (a, real[0]), "b": (b[:, :1], real[1][:, :1])}))
    assert (embedding - fusion({"a": (a, real[0]), "b": (b + 1, real[1])})).abs().max() > 1e-3


def test_cross_attention_streams_meet():
    fusion = scramble(CrossAttentionFusion({"a": 3, "b": 2}, CLASSES, width=8, layers=1, heads=2))
    a, b = torch.randn(1, 3, 3), torch.randn(1, 2, 2)
    real = {"a": torch.ones(1, 3, dtype=torch.bool), "b": torch.ones(1, 2, dtype=torch.bool)}
    before = fusion({"a": (a, real["a"]), "b": (b, real["b"])})
    after = fusion({"a": (a, real["a"]), "b": (b + 1, real["b"])})
    assert before.shape == (1, 16)
    assert ((before - after).abs().view(2, 8).max(1).values > 1e-4).all()  # b reaches the stream of a too


# ---------------------------------------------------------------------------------------------------------
# Whatever the parts, a model keeps its promises


@pytest.mark.parametrize("modalities", MODALITIES, ids=lambda m: "+".join(m))
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_takes_every_set_of_modalities(fusion, modalities):
    model, inputs = build(modalities, fusion), random_inputs(modalities, 4)
    embedding, logits = model(inputs)
    assert embedding.ndim == 2
    assert logits.shape == (4, CLASSES)
    # inert dropout: the same bits again; independent rows: the same sample alone, and in another order
    again = model(inputs)
    assert torch.equal(embedding, again.embedding)
    assert torch.equal(logits, again.logits)
    alone = model({name: x[2:3] for name, x in inputs.items()})
    torch.testing.assert_close(alone.embedding, embedding[2:3], atol=1e-5, rtol=1e-4)
    turned = model({name: x.flip(0) for name, x in inputs.items()})
    torch.testing.assert_close(turned.logits, logits.flip(0), atol=1e-5, rtol=1e-4)
    # shared inputs, encoded once
    rows = {name: torch.tensor([3, 0, 0]) for name in modalities}
    torch.testing.assert_close(model(inputs, rows).logits, logits[[3, 0, 0]], atol=1e-5, rtol=1e-4)
    # every parameter learns
    F.cross_entropy(model.train()(inputs).logits, torch.tensor([0, 1, 2, 0])).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


@pytest.mark.parametrize("encoder", [WordEmbedding, WordTransformer])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_text_without_words_is_no_accident(fusion, encoder):
    modalities = {"image": IMAGE, "text": TEXT}
    model, inputs = build(modalities, fusion, text=partial(encoder, width=8)), random_inputs(modalities, 2)
    _, layout = TEXT.prepare("is there a red circle ?")
    box = torch.tensor([TEXT.box(TEXT.root("text", layout), layout)])
    deleted = TEXT.occlude(inputs["text"][:1], box[None], "delete", None)
    assert deleted[0].tolist() == [2, 3] + [0] * 10
    inputs["text"] = torch.cat([deleted, torch.zeros_like(deleted)])  # and one that is padding alone
    embedding, logits = model(inputs)
    assert embedding.isfinite().all()
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_every_modality_can_have_a_transformer_of_its_own():
    modalities = {"text": TEXT, "image": GREY, "audio": AUDIO}
    model, inputs = build(modalities, "concat", **TRANSFORMERS), random_inputs(modalities, 3)
    logits = model(inputs).logits
    assert logits.shape == (3, CLASSES)
    alone = model({name: x[1:2] for name, x in inputs.items()}).logits
    torch.testing.assert_close(alone, logits[1:2], atol=1e-5, rtol=1e-4)


def test_half_precision():
    modalities = {"text": TEXT, "image": GREY, "audio": AUDIO}
    model, inputs = build(modalities).to(torch.bfloat16), random_inputs(modalities, 2)
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    assert model(inputs).logits.isfinite().all()


def test_parts_that_do_not_fit():
    with pytest.raises(MuroanError, match=r"does not fit the dataset.*model\.encoders\.video"):
        build({"image": IMAGE, "video": IMAGE})
    with pytest.raises(MuroanError, match="ConvTokens encodes Image, got Audio"):
        build({"image": AUDIO})
    with pytest.raises(MuroanError, match="model/head=linear"):
        build({"image": IMAGE, "text": TEXT}, "mmbt", SumHead)
    with pytest.raises(MuroanError, match="the batch has"):
        build({"image": IMAGE, "text": TEXT})({"image": torch.zeros(1, 3, 64, 64)})
    with pytest.raises(MuroanError, match=r"image of shape \(B, 3, 64, 64\), got \(1, 3, 32, 32\)"):
        build({"image": IMAGE})({"image": torch.zeros(1, 3, 32, 32)})


# ---------------------------------------------------------------------------------------------------------
# The config files


def model_config(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=list(overrides)).model


@pytest.mark.parametrize("modalities", MODALITIES[2:], ids=lambda m: "+".join(m))
@pytest.mark.parametrize("name", FUSIONS)
def test_native_configs(name, modalities):
    model = instantiate(model_config(f"+model={name}"))(modalities=modalities, num_classes=CLASSES)
    assert model.eval()(random_inputs(modalities, 2)).logits.shape == (2, CLASSES)


@pytest.mark.parametrize("group", ["encoders", "fusion", "head"])
def test_every_part_can_be_chosen(group):
    modalities = MODALITIES[2]
    for file in sorted((CONF / "model" / group).glob("*.yaml")):
        base = "late_fusion" if file.stem == "sum" else "mmbt"
        config = model_config(f"+model={base}", f"model/{group}={file.stem}")
        model = instantiate(config)(modalities=modalities, num_classes=CLASSES)
        assert model.eval()(random_inputs(modalities, 2)).logits.shape == (2, CLASSES)


# ---------------------------------------------------------------------------------------------------------
# Hugging Face: tiny random checkpoints, written and read back


WORDS = ["is", "there", "a", "red", "circle", "un", "##believ", "##able", "?", "!", "'", "don", "t", "no", "yes"]
SENTENCES = ["Is there a red circle?", "unbelievable , don't !", "a  red\tcircle", "circle circle ?!", "zebra a"]


def write_image_processor(folder):
    numbers = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))


@pytest.fixture(scope="module")
def wordpiece():
    from transformers import BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})


@pytest.fixture(scope="module")
def bpe():
    from transformers import CLIPTokenizer

    merges = [("r", "e"), ("re", "d</w>"), ("i", "r"), ("c", "ir"), ("cir", "c"), ("l", "e</w>"), ("circ", "le</w>")]
    letters = [*"abcdefghijklmnopqrstuvwxyz?!',"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


@pytest.fixture(scope="module")
def vilt_folder(tmp_path_factory, wordpiece):
    from transformers import ViltConfig, ViltForQuestionAnswering

    folder = tmp_path_factory.mktemp("vilt")
    config = ViltConfig(
        vocab_size=len(wordpiece),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        max_position_embeddings=16,
        id2label={0: "no", 1: "yes", 2: "red"},
        label2id={"no": 0, "yes": 1, "red": 2},
    )
    scramble(ViltForQuestionAnswering(config), 0.5).save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    write_image_processor(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, bpe):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ids = {"bos_token_id": bpe.bos_token_id, "eos_token_id": bpe.eos_token_id, "pad_token_id": bpe.pad_token_id}
    config = CLIPConfig(
        text_config=size | ids | {"vocab_size": len(bpe), "max_position_embeddings": 40},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    scramble(CLIPModel(config)).save_pretrained(folder)
    bpe.save_pretrained(folder)
    write_image_processor(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_tokenizer_gives_the_ids_of_the_whole_text(kind, request):
    from muroan.models.huggingface import HFTokenizer

    reference = request.getfixturevalue(kind)
    tokenizer = HFTokenizer(reference)
    for sentence in SENTENCES:
        words = sentence.split()
        pieces = tokenizer.words_to_ids(words)
        flat = [token for piece in pieces for token in piece]
        assert tokenizer.prefix + flat + tokenizer.suffix == reference(sentence)["input_ids"]
        # and a word has the ids that it has alone: removing one leaves the others as they are
        assert pieces == [reference(word, add_special_tokens=False)["input_ids"] for word in words]
    text = Text(tokenizer, 40)
    ids, layout = text.prepare(SENTENCES[1])
    padded = reference(SENTENCES[1], padding="max_length", max_length=40)["input_ids"]
    assert ids.tolist() == padded
    assert len(layout.spans) == 4
    assert layout.spans[0][1] - layout.spans[0][0] > 1
    assert tokenizer.size == len(reference)


def test_a_word_that_the_tokenizer_ignores_has_no_tokens(wordpiece):
    from muroan.models.huggingface import HFTokenizer

    tokenizer = HFTokenizer(wordpiece)
    red, circle = tokenizer.words_to_ids(["red", "circle"])
    assert tokenizer.words_to_ids(["\u200b", "red", "\u200b", "circle"]) == [[], red, [], circle]


def inputs_for(model):
    image = torch.randn(len(SENTENCES), *model.modalities["image"].shape)
    return {"image": image, "text": torch.stack([model.modalities["text"].prepare(s)[0] for s in SENTENCES])}


def reference_inputs(folder, inputs):
    """The same as the library itself would prepare it: tokenised at once, padded to the longest."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    return {**tokens, "pixel_values": inputs["image"]}


def check_promises(model, inputs):
    """Deterministic, independent of the rest of the batch, alive without words; leaves the random state alone."""
    state = torch.random.get_rng_state()
    first, again = model(inputs), model(inputs)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.logits, again.logits)
    alone = model({name: x[1:2] for name, x in inputs.items()})
    torch.testing.assert_close(alone.embedding, first.embedding[1:2], atol=1e-5, rtol=1e-4)
    text = model.modalities["text"]
    ids, layout = text.prepare(SENTENCES[0])
    box = torch.tensor([[text.box(text.root("text", layout), layout)]])
    deleted = text.occlude(ids[None], box, "delete", None)
    assert model({"image": inputs["image"][:1], "text": deleted}).logits.isfinite().all()


def test_vilt_is_the_library_s_vilt(vilt_folder):
    from transformers import ViltForQuestionAnswering

    from muroan.models.huggingface import Vilt

    model = Vilt({"image": IMAGE, "text": TEXT}, 3, vilt_folder).eval()
    assert model.pretrained
    assert model.modalities["image"].shape == (3, 32, 32)
    assert model.modalities["image"].mean == (0.4, 0.5, 0.6)
    inputs = inputs_for(model)
    with torch.no_grad():
        prediction = model(inputs)
        expected = ViltForQuestionAnswering.from_pretrained(vilt_folder)(**reference_inputs(vilt_folder, inputs)).logits
        check_promises(model, inputs)
    assert prediction.embedding.shape == (5, 16)
    assert expected.std(0).min() > 1e-3  # else the comparison would say nothing
    torch.testing.assert_close(prediction.logits, expected, atol=1e-5, rtol=1e-5)


def test_vilt_with_other_classes(vilt_folder):
    from muroan.models.huggingface import Vilt

    modalities = {"text": TEXT, "picture": IMAGE}  # names are the dataset's
    model = Vilt(modalities, 7, vilt_folder, max_length=10).eval()
    assert not model.pretrained
    assert list(model.modalities) == ["picture", "text"]
    assert model(random_inputs(model.modalities, 2)).logits.shape == (2, 7)
    every = Vilt(modalities, 3, vilt_folder).eval()
    chosen = Vilt(modalities, 2, vilt_folder, answers=["red", "no"]).eval()
    assert chosen.pretrained
    inputs = random_inputs(every.modalities, 2)
    torch.testing.assert_close(chosen(inputs).logits, every(inputs).logits[:, [2, 0]])
    with pytest.raises(MuroanError, match="does not know \\['purple'\\]"):
        Vilt(modalities, 2, vilt_folder, answers=["red", "purple"])
    with pytest.raises(MuroanError, match="up to 16 tokens"):
        Vilt(modalities, 2, vilt_folder, max_length=17)


def test_clip_similarity_is_the_library_s(clip_folder):
    from transformers import CLIPModel

    from muroan.models.huggingface import Clip

    model = Clip({"image": IMAGE, "text": TEXT}, 2, clip_folder, fusion="similarity", threshold=0.1).eval()
    assert model.pretrained
    inputs = inputs_for(model)
    with torch.no_grad():
        embedding, logits = model(inputs)
        raw = CLIPModel.from_pretrained(clip_folder)
        expected = raw(**reference_inputs(clip_folder, inputs)).logits_per_image.diagonal()
        check_promises(model, inputs)
    scale = raw.logit_scale.exp()
    assert expected.std() > 1e-3
    torch.testing.assert_close(scale * embedding.sum(1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected - 0.1 * scale, atol=1e-5, rtol=1e-5)


def test_clip_features(clip_folder):
    from muroan.models.huggingface import Clip

    model = Clip({"image": IMAGE, "text": TEXT}, 4, clip_folder).eval()
    assert not model.pretrained
    inputs = inputs_for(model)
    with torch.no_grad():
        v, t, product = model(inputs).embedding.chunk(3, 1)
        check_promises(model, inputs)
    torch.testing.assert_close(v * t, product)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(5))
    with pytest.raises(MuroanError, match="the dataset has 4"):
        Clip({"image": IMAGE, "text": TEXT}, 4, clip_folder, fusion="similarity")
    with pytest.raises(MuroanError, match="concat or similarity"):
        Clip({"image": IMAGE, "text": TEXT}, 4, clip_folder, fusion="sum")


TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}


def test_full_mmbt_with_random_weights():
    from muroan.models.mmbt_full import MMBTFull

    model = MMBTFull({"image": IMAGE, "text": TEXT}, CLASSES, TINY_BERT, TINY_RESNET, size=(64, 64)).eval()
    assert model.modalities["text"] is TEXT  # random weights go with the dataset's own words
    inputs = random_inputs(model.modalities, 5)
    image = model.encode("image", inputs["image"])
    assert image.shape == (5, 3, 16)
    assert torch.equal(model.encode("text", inputs["text"]), inputs["text"])
    with torch.no_grad():
        check_promises(model, inputs)
        # by hand for one sample without padding: [CLS] image [SEP] words [SEP]
        bert, ids = model.bert, torch.tensor([[2, 7, 8, 3]])
        word = bert.embeddings.word_embeddings.weight
        expected = bert(
            inputs_embeds=torch.cat([word[[2]], image[0], word[[3, 7, 8, 3]]])[None],
            token_type_ids=torch.tensor([[0] * 5 + [1] * 3]),
            position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]),
        ).pooler_output
        padded = F.pad(ids, (0, TEXT.max_length - 4), value=TEXT.tokenizer.pad_id)
        torch.testing.assert_close(model.fuse({"image": image[:1], "text": padded}), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
def test_gradients_by_the_words_of_full_mmbt(method):
    """What autograd says of the table's rows, of a text in which no word comes twice."""
    from muroan.models.mmbt_full import MMBTFull

    model = MMBTFull({"image": IMAGE, "text": TEXT}, CLASSES, TINY_BERT, TINY_RESNET, size=(64, 64))
    scramble(model)
    example = Example("a", {"image": np.full((64, 64, 3), 90, np.uint8), "text": "is there a red circle"}, 0)
    (sample,) = PreparedDataset([example], model.modalities, CLASSES)
    inputs = {name: x[None] for name, x in sample.inputs.items()}
    with torch.no_grad():
        clean = model(inputs)
        features = {name: model.encode(name, x) for name, x in inputs.items()}
    labels = clean.logits.argmax(1)
    view = SimpleNamespace(layouts=sample.layouts, modalities=model.modalities)
    target = Target(model, [view], inputs, labels, [math.inf], features, clean, {})
    _, found = target.gradient(Target.margin, {}, of=["image", "text"])
    assert found["text"].shape == (1, TEXT.max_length, 16)
    table = model.bert.get_input_embeddings().weight
    (by_row,) = torch.autograd.grad(Target.margin(model(inputs), labels).sum(), table)
    for start, stop in sample.layouts["text"].spans:
        for at in range(start, stop):
            torch.testing.assert_close(found["text"][0, at], by_row[inputs["text"][0, at]])
    assert "encode" not in vars(model)
    record = evaluate(model, [replace(sample, label=int(labels))], SaliencyRemoval(method, 3))[0]
    assert record.ledger["attribute"].backwards == (1 if method == "gradient" else 3)


def test_full_mmbt_from_checkpoints(tmp_path, wordpiece):
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

    from muroan.models.mmbt_full import MMBTFull

    bert = BertModel(BertConfig(vocab_size=len(wordpiece), max_position_embeddings=32, **TINY_BERT))
    bert.save_pretrained(tmp_path / "bert")
    wordpiece.save_pretrained(tmp_path / "bert")
    ResNetModel(ResNetConfig(**TINY_RESNET)).save_pretrained(tmp_path / "resnet")
    write_image_processor(tmp_path / "resnet")
    where = {"bert": str(tmp_path / "bert"), "resnet": str(tmp_path / "resnet")}
    model = MMBTFull({"image": IMAGE, "text": TEXT}, CLASSES, **where, grid=(2, 2), size=(64, 64), max_length=24).eval()
    assert model.modalities["image"].std == (0.2, 0.25, 0.3)
    assert model.modalities["text"].shape == (24,)
    torch.testing.assert_close(model.bert.pooler.dense.weight, bert.pooler.dense.weight)
    with torch.no_grad():
        check_promises(model, inputs_for(model))
    with pytest.raises(MuroanError, match="up to 32 tokens"):
        MMBTFull({"image": IMAGE, "text": TEXT}, CLASSES, **where, size=(64, 64))


def test_a_checkpoint_of_something_else_or_of_a_part(vilt_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from muroan.models.huggingface import Clip, Vilt

    modalities = {"image": IMAGE, "text": TEXT}
    with pytest.raises(MuroanError, match="holds a 'vilt' model, expected 'clip'"):
        Clip(modalities, 2, vilt_folder)
    for file in Path(vilt_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["vilt.pooler.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MuroanError, match=r"lacks 1 weights of ViltFor.*, such as vilt\.pooler\.dense"):
        Vilt(modalities, 3, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(MuroanError, match="could not be loaded"):
        Vilt(modalities, 3, str(tmp_path))


@pytest.mark.parametrize("name", ["vilt", "clip", "mmbt_full"])
def test_a_missing_checkpoint_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    key = "bert" if name == "mmbt_full" else "checkpoint"
    extra = ["model.resnet={depths:[1,1,1,1]}"] if name == "mmbt_full" else []
    config = model_config(f"+model={name}", f"model.{key}={tmp_path}/nowhere", *extra)
    with pytest.raises(MuroanError, match=rf"could not be loaded from '{tmp_path}/nowhere'.*hf download"):
        instantiate(config)(modalities={"image": IMAGE, "text": TEXT}, num_classes=CLASSES)
    with pytest.raises(MuroanError, match=r"does not fit the dataset: .* one Image and one Text, got image"):
        instantiate(config)(modalities={"image": IMAGE, "audio": AUDIO}, num_classes=CLASSES)

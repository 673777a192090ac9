"""Hugging Face checkpoints as target models: loading, tokenizers, and an adapter each for ViLT and CLIP.

An adapter brings its own modalities: the image size and normalisation and the tokenizer that it was trained with.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    ImageProcessingMixin,
    ViltConfig,
    ViltForQuestionAnswering,
)

from muroan.errors import MuroanError
from muroan.modalities import Image, Modality, Text
from muroan.models.base import Features, MultimodalModel


def load(part: Any, checkpoint: str, **options: Any) -> Any:
    """`part.from_pretrained(checkpoint, **options)`.

    Raises:
        MuroanError: there is no such local folder or hub name, it cannot be reached, or it lacks this part.
    """
    method = part.get_image_processor_dict if part is ImageProcessingMixin else part.from_pretrained
    try:
        return method(checkpoint, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MuroanError(
            f"{part.__name__} could not be loaded from {checkpoint!r}, tried as a local folder and as a name on the "
            f"Hugging Face hub: {reason} Set the model's checkpoint to a folder that save_pretrained wrote, or where "
            f"there is a network download it with `hf download {checkpoint}`"
        ) from error


def load_config(kind: Any, checkpoint: str) -> Any:
    """The configuration of a checkpoint.

    Raises:
        MuroanError: it cannot be loaded, or is that of another kind of model.
    """
    config = load(AutoConfig, checkpoint)
    if not isinstance(config, kind):
        raise MuroanError(f"{checkpoint!r} holds a {config.model_type!r} model, expected {kind.model_type!r}")
    return config


def load_model(part: Any, checkpoint: str, new: str = "", **options: Any) -> Any:
    """A model with the weights of a checkpoint, in float32.

    The library only warns when a checkpoint lacks weights, and draws them at random: here that is an error, since a
    measurement of random weights looks like any other.

    Args:
        new: what the names of weights start with that may be missing, for they will be trained.

    Raises:
        MuroanError: it cannot be loaded, is of another kind, or lacks weights.
    """
    load_config(part.config_class, checkpoint)
    model, info = load(part, checkpoint, dtype=torch.float32, output_loading_info=True, **options)
    names = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    missing = sorted(name for name in names if not (new and name.startswith(new)))
    if missing:
        raise MuroanError(
            f"{checkpoint!r} lacks {len(missing)} weights of {part.__name__}, such as {missing[0]}: "
            "choose a checkpoint of the whole model"
        )
    return model


class HFTokenizer:
    """A fast Hugging Face tokenizer as `muroan.modalities.Text` wants it.

    The ids of a text are exactly those of the whole text tokenised at once; each goes to the word that its last
    character lies in, by the tokenizer's own offsets.

    Raises:
        MuroanError: the tokenizer has no offsets or no padding token.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast or tokenizer.pad_token_id is None:
            raise MuroanError(f"a fast tokenizer with a padding token is needed, got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        # The special tokens around a text, read off an example.
        example = tokenizer("a", return_special_tokens_mask=True)
        ids, special = example["input_ids"], example["special_tokens_mask"]
        first, last = special.index(0), len(special) - special[::-1].index(0)
        self.prefix, self.suffix = list(ids[:first]), list(ids[last:])
        self.pad_id, self.mask_id = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.size = len(tokenizer)

    def words_to_ids(self, words: Sequence[str]) -> list[list[int]]:
        """The token ids of each word; none for a word that the tokenizer ignores, such as a control character."""
        text = self.tokenizer(" ".join(words), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))
        pieces: list[list[int]] = [[] for _ in words]
        for token, (start, stop) in zip(text["input_ids"], text["offset_mapping"], strict=True):
            last = max(start, stop - 1)
            pieces[bisect_right(starts, last + 1) - 1].append(token)  # + 1: a space belongs to the word after it
        return pieces


def image_of(checkpoint: str, size: tuple[int, int]) -> Image:
    """The image modality with the mean and standard deviation that a checkpoint was trained with."""
    numbers, _ = load(ImageProcessingMixin, checkpoint)
    return Image(size, numbers["image_mean"], numbers["image_std"])


def text_of(checkpoint: str, longest: int, max_length: int | None, truncate: bool) -> Text:
    """The text modality with a checkpoint's tokenizer.

    Raises:
        MuroanError: `max_length` is more than the `longest` text that the checkpoint reads.
    """
    if max_length is not None and max_length > longest:
        raise MuroanError(f"{checkpoint} reads texts of up to {longest} tokens, got max_length={max_length}")
    return Text(HFTokenizer(load(AutoTokenizer, checkpoint)), max_length or longest, truncate)


def image_and_text(model: str, modalities: Mapping[str, Modality]) -> tuple[str, str]:
    """The names of a dataset's image and text.

    Raises:
        MuroanError: the dataset has not exactly one of each.
    """
    by_kind = {type(modality): name for name, modality in modalities.items()}
    if len(modalities) != 2 or set(by_kind) != {Image, Text}:
        kinds = ", ".join(f"{name} ({type(modality).__name__})" for name, modality in modalities.items())
        raise MuroanError(f"a model that does not fit the dataset: {model} takes one Image and one Text, got {kinds}")
    return by_kind[Image], by_kind[Text]


class Vilt(MultimodalModel):
    """ViLT (Kim et al. 2021, arXiv 2102.03334): one transformer over words and image patches.

    The fusion embedding is the pooled first token, (B, D). A checkpoint for question answering keeps its classifier,
    and can be attacked as it is, when it has `num_classes` answers, or when the dataset's classes are named in
    `answers`; otherwise the classifier is new and to be trained.

    Args:
        checkpoint: hub name or local folder.
        answers: the classes of the dataset, in order, as the checkpoint spells them (`config.label2id`).
        max_length: tokens of a text, the checkpoint's own limit when None; truncate: see `Text`.

    Raises:
        MuroanError: the checkpoint is missing, an answer is unknown to it, or the dataset is not image and text.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_classes: int,
        checkpoint: str = "dandelin/vilt-b32-finetuned-vqa",
        answers: Sequence[str] | None = None,
        max_length: int | None = None,
        truncate: bool = False,
    ):
        names = image_and_text("Vilt", modalities)
        config = load_config(ViltConfig, checkpoint)
        unknown = [answer for answer in answers or [] if answer not in config.label2id]
        if unknown or (answers is not None and len(answers) != num_classes):
            raise MuroanError(
                f"model.answers must name the {num_classes} classes among the {config.num_labels} answers of "
                f"{checkpoint}, got {len(answers or [])}, of which it does not know {unknown}"
            )
        image = image_of(checkpoint, (config.image_size, config.image_size))
        text = text_of(checkpoint, config.max_position_embeddings, max_length, truncate)
        super().__init__({name: modality for name, modality in zip(names, (image, text), strict=True)}, num_classes)
        self.image, self.text, self.pad_id = *names, text.tokenizer.pad_id
        trained = "ViltForQuestionAnswering" in (config.architectures or [])
        self.pretrained = trained and (answers is not None or config.num_labels == num_classes)
        new: dict[str, Any] = {"new": "classifier", "num_labels": num_classes, "ignore_mismatched_sizes": True}
        self.vilt = load_model(ViltForQuestionAnswering, checkpoint, **({} if self.pretrained else new))
        self.chosen = [config.label2id[answer] for answer in answers or []]

    def encode(self, modality: str, x: Tensor) -> Features:
        """Patch embeddings (B, 1 + patches, D) of an image; the ids (B, T) of a text."""
        if modality == self.text:
            return x
        # Not `visual_embed`, which shuffles the patches by the global random state.
        embed = self.vilt.vilt.embeddings
        patches = embed.patch_embeddings(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([embed.cls_token.expand(len(x), -1, -1), patches], 1)
        return embed.dropout(tokens + embed.position_embeddings)

    def fuse(self, features: dict[str, Any]) -> Tensor:
        ids, patches = features[self.text], features[self.image]
        return self.vilt.vilt(
            input_ids=ids,
            attention_mask=(ids != self.pad_id).long(),
            image_embeds=patches,
            pixel_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=ids.device),
        ).pooler_output

    def head(self, embedding: Tensor) -> Tensor:
        logits = self.vilt.classifier(embedding)
        return logits[:, self.chosen] if self.chosen else logits


class Clip(MultimodalModel):
    """CLIP (Radford et al. 2021, arXiv 2103.00020): an image and a text encoder into one space.

    With v and t the normalised features (B, D), `fusion` is one of:
    - `concat`: the fusion embedding is [v; t; v*t], (B, 3D), and the head a new linear layer, to be trained;
    - `similarity`: it is v*t, (B, D), whose sum is the cosine; the two logits say no match (0) or match (1), which is
      where the cosine is above `threshold`. Usable untrained; training moves the threshold too.

    Args:
        checkpoint: hub name or local folder.
        max_length: tokens of a text, the checkpoint's own limit when None; truncate: see `Text`.

    Raises:
        MuroanError: the checkpoint is missing, the dataset is not image and text, or `similarity` has not two classes.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_classes: int,
        checkpoint: str = "openai/clip-vit-base-patch32",
        fusion: str = "concat",
        threshold: float = 0.25,
        max_length: int | None = None,
        truncate: bool = False,
    ):
        names = image_and_text("Clip", modalities)
        if fusion not in ("concat", "similarity"):
            raise MuroanError(f"model.fusion of Clip is concat or similarity, got {fusion!r}")
        if fusion == "similarity" and num_classes != 2:
            raise MuroanError(f"CLIP's similarity tells no match (0) from match (1), the dataset has {num_classes}")
        config = load_config(CLIPConfig, checkpoint)
        image = image_of(checkpoint, (config.vision_config.image_size, config.vision_config.image_size))
        text = text_of(checkpoint, config.text_config.max_position_embeddings, max_length, truncate)
        super().__init__({name: modality for name, modality in zip(names, (image, text), strict=True)}, num_classes)
        self.image, self.text = names
        self.pretrained = fusion == "similarity"
        self.clip = load_model(CLIPModel, checkpoint)
        if fusion == "similarity":
            self.threshold = nn.Parameter(torch.tensor(threshold))
        else:
            self.linear = nn.Linear(3 * config.projection_dim, num_classes)
            self.clip.logit_scale.requires_grad_(False)  # unused, which distributed training refuses

    def encode(self, modality: str, x: Tensor) -> Features:
        """The normalised feature (B, D)."""
        if modality == self.image:
            feature = self.clip.visual_projection(self.clip.vision_model(pixel_values=x).pooler_output)
        else:
            # No mask for the padding: the text encoder is causal, and its output is read at the first end token.
            feature = self.clip.text_projection(self.clip.text_model(input_ids=x).pooler_output)
        return F.normalize(feature, dim=-1)

    def fuse(self, features: dict[str, Any]) -> Tensor:
        v, t = features[self.image], features[self.text]
        return v * t if self.pretrained else torch.cat([v, t, v * t], 1)

    def head(self, embedding: Tensor) -> Tensor:
        if not self.pretrained:
            return self.linear(embedding)
        margin = self.clip.logit_scale.exp() * (embedding.sum(1) - self.threshold)
        return torch.stack([-margin / 2, margin / 2], 1)

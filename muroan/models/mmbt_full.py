"""The multimodal bitransformer in full size: BERT-base over words and the feature map of a ResNet-152."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from muroan.modalities import Image, Modality, Text
from muroan.models.base import Features, MultimodalModel
from muroan.models.encoders import pooling_matrix
from muroan.models.huggingface import image_and_text, image_of, load_model, text_of


class MMBTFull(MultimodalModel):
    """MMBT (Kiela et al. 2019, arXiv 1909.02950, section 3).

    The ResNet's last feature map is averaged to a grid of N image embeddings, projected to BERT's width; BERT reads
    [CLS] image [SEP] as its first segment and words [SEP] as its second, positions counted from 0 in each. The fusion
    embedding is BERT's pooled output, (B, D).

    Args:
        bert, resnet: hub name or local folder; or numbers of a `BertConfig` or `ResNetConfig` for random weights
            ({} for the sizes of BERT-base and ResNet-152), then with the dataset's own tokenizer.
        grid: (rows, columns), N in all.
        size: (height, width) of the image.
        max_length: tokens of a text when BERT is pretrained; truncate: see `Text`.

    Raises:
        MuroanError: a checkpoint is missing, the text is longer than BERT reads, or the dataset is not image and text.
    """

    rows: Tensor
    columns: Tensor
    prefix: Tensor
    suffix: Tensor

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_classes: int,
        bert: str | Mapping[str, Any] = "google-bert/bert-base-uncased",
        resnet: str | Mapping[str, Any] = "microsoft/resnet-152",
        grid: tuple[int, int] = (3, 1),
        size: tuple[int, int] = (224, 224),
        max_length: int = 64,
        truncate: bool = False,
    ):
        names = image_and_text("MMBTFull", modalities)
        if isinstance(resnet, str):
            vision, image = load_model(ResNetModel, resnet), image_of(resnet, size)
        else:  # normalised by the channel statistics of ImageNet
            vision = ResNetModel(ResNetConfig(**{"depths": [3, 8, 36, 3], **resnet}))
            image = Image(size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if isinstance(bert, str):
            language = load_model(BertModel, bert, new="pooler")
            text = text_of(bert, language.config.max_position_embeddings, max_length, truncate)
        else:
            own = modalities[names[1]]
            assert isinstance(own, Text)
            language, text = BertModel(BertConfig(**{"vocab_size": own.tokenizer.size, **bert})), own
        super().__init__({name: modality for name, modality in zip(names, (image, text), strict=True)}, num_classes)
        self.image, self.text = names
        # A GPU's convolutions take and give channels last: else they turn every map around, and back.
        self.bert, self.resnet = language, vision.to(memory_format=torch.channels_last)
        self.channels_last = [self.image]
        self.pad_id = text.tokenizer.pad_id
        for part, tokens in {"prefix": text.tokenizer.prefix, "suffix": text.tokenizer.suffix}.items():
            self.register_buffer(part, torch.tensor(tokens, dtype=torch.long), persistent=False)
        rows, columns = (pooling_matrix(math.ceil(s / 32), g) for s, g in zip(size, grid, strict=True))
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns.T.contiguous(), persistent=False)
        width = language.config.hidden_size
        self.project = nn.Linear(vision.config.hidden_sizes[-1], width)
        self.classifier = nn.Linear(width, num_classes)

    def encode(self, modality: str, x: Tensor) -> Features:
        """Image embeddings (B, N, D); the ids (B, T) of a text."""
        if modality == self.text:
            return x
        x = self.resnet(x).last_hidden_state  # (B, 2048, H/32, W/32)
        x = self.rows @ x @ self.columns  # (B, 2048, rows, columns)
        return self.project(x.flatten(2).transpose(1, 2))

    def fuse(self, features: dict[str, Any]) -> Tensor:
        ids, image = features[self.text], features[self.image]
        embed, first = self.bert.get_input_embeddings(), len(self.prefix)  # its [CLS] moves before the image
        words, embedded = ids[:, first:], embed(ids)[:, first:]
        # Not by the table's own call, so that the text itself is its only one: gradients by words need that.
        around = (F.embedding(tokens, embed.weight) for tokens in (self.prefix, self.suffix))
        cls, sep = (t.expand(len(ids), -1, -1) for t in around)
        inputs = torch.cat([cls, image, sep, embedded], 1)
        before = torch.arange(image.shape[1] + 2, device=ids.device)  # positions of the first segment
        after = torch.arange(words.shape[1], device=ids.device)  # and of the second
        # As BERT adds it to its scores: of a plain mask it would look whether anything is masked at all, and the CPU
        # wait until the GPU knows.
        mask = inputs.new_zeros(inputs.shape[:2])
        mask[:, len(before) :].masked_fill_(words == self.pad_id, torch.finfo(mask.dtype).min)
        return self.bert(
            inputs_embeds=inputs,
            attention_mask=mask[:, None, None].expand(-1, -1, inputs.shape[1], -1),
            position_ids=torch.cat([before, after]).expand(len(ids), -1),
            token_type_ids=torch.cat([0 * before, 0 * after + 1]).expand(len(ids), -1),
        ).pooler_output

    def head(self, embedding: Tensor) -> Tensor:
        return self.classifier(embedding)

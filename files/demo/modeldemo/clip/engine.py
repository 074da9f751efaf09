"""Compares a picture with labels by a loaded CLIP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.configuration_clip import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from ..device import choose_device, choose_precision, ran_out, require_alive
from ..engine import (
    BadRequest,
    Conversation,
    ModelDemoError,
    OutOfMemory,
    Page,
    Piece,
    Sampling,
    Turn,
)
from ..hub_folder import Settings
from ..pretrained import load, read_config, tensors
from . import labels, openai
from .settings import WORDS, archive

log = logging.getLogger("modeldemo")

BATCH = 64  # labels that are read at once: between two batches the reader can leave
# A longer strip would be enlarged to a bomb before its middle is cut out.
LONGEST = 10  # times the shorter side


class ClipEngine:
    """The Engine of CLIP: the last picture against the labels of the last turn."""

    page = Page(kind="labels", pictures="one")
    defaults = Sampling()
    health = Conversation(
        (Turn("user", "a red picture\na blue picture", (Image.new("RGB", (64, 64), "red"),)),)
    )

    def __init__(
        self,
        model_id: str,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        processor: CLIPImageProcessorPil,
    ) -> None:
        self.model_id = model_id
        self._model = model
        self._processor = processor
        self._tokens = tokenizer.backend_tokenizer
        # A label that holds <|endoftext|> means these letters.
        self._tokens.encode_special_tokens = True
        self._tokens.no_padding()
        self._tokens.no_truncation()
        self._end = int(tokenizer.eos_token_id)
        self._device = model.logit_scale.device
        self.context = model.text_model.embeddings.position_embedding.num_embeddings

    @classmethod
    def load(cls, settings: Settings, device: str, model_id: str) -> ClipEngine:
        """Small checks first, then the weights; raises ModelDemoError, one line."""
        where, folder = choose_device(device), settings.folder
        # Half a gigabyte fits everywhere, and the numbers are the answer.
        auto = settings.precision == "auto"
        precision = choose_precision("fp32" if auto else settings.precision, where)
        found = _openai(folder) if archive(folder) else _hugging_face(folder)
        config, tokenizer, processor, weights = found
        with torch.device("meta"):
            model = CLIPModel(config)
        load(model, weights, folder, where, precision)
        for part in (model.text_model.embeddings, model.vision_model.embeddings):
            # Not in the files; made on the meta device with the rest.
            count = part.position_embedding.num_embeddings
            part.position_ids = torch.arange(count, device=where)[None]
        log.info("%s: CLIP in %s on %s", model_id, precision, where)
        return cls(model_id, model, tokenizer, processor)

    def stream(self, conversation: Conversation, sampling: Sampling) -> Iterator[Piece]:
        """Yield one piece with all labels, the best first, after empty ones.

        It is what labels.write writes, or labels.write_json where `sampling.json` is set.

        Raises BadRequest without a picture, without a label and for one over the context.
        """
        if not conversation.images:
            raise BadRequest("messages: this model compares a picture with labels; attach one")
        names = labels.read(conversation.turns[-1].text)
        write = labels.write_json if sampling.json else labels.write
        ids = [self._ids(name) for name in names]
        return self._stream(conversation.images[-1], names, ids, write)

    def _ids(self, label: str) -> list[int]:
        """The label's tokens between those of beginning and end."""
        ids: list[int] = self._tokens.encode(label).ids
        if len(ids) > self.context:
            raise BadRequest(
                f"messages: the label {label[:40]!r}… has {len(ids) - 2} tokens, and this model "
                f"reads {self.context - 2}; shorten it"
            )
        return ids

    @torch.inference_mode()
    def _stream(
        self,
        image: Image.Image,
        names: Sequence[str],
        ids: Sequence[list[int]],
        write: Callable[[list[labels.Score]], str],
    ) -> Iterator[Piece]:
        yield Piece(prompt_tokens=sum(map(len, ids)))
        try:
            picture = self._picture(image)
            texts = []
            for start in range(0, len(ids), BATCH):
                yield Piece(pictures_encoded=int(start == 0))
                texts.append(self._texts(ids[start : start + BATCH]))
            cosines = (torch.cat(texts) @ picture.T)[:, 0]
            shares = (cosines * self._model.logit_scale.float().exp()).softmax(0)
        except RuntimeError as error:
            require_alive(self._device)
            if not ran_out(error):
                raise
            torch.cuda.empty_cache()
            raise OutOfMemory("GPU out of memory: something else uses it; ask again") from error
        if not bool(torch.isfinite(shares).all()):
            raise ModelDemoError(
                "the model's output is not a number: check the weights' hashes, or set "
                "model.precision to fp32"
            )
        alone = len(names) == 1
        scores = [
            labels.Score(name, cosine, None if alone else share)
            for name, cosine, share in zip(names, cosines.tolist(), shares.tolist(), strict=True)
        ]
        yield Piece(write(scores), finish="stop")

    def _picture(self, image: Image.Image) -> Tensor:
        """[1, projection] of length 1."""
        pixels = self._processor(images=middle(image), return_tensors="pt")["pixel_values"]
        found = self._model.get_image_features(
            pixels.to(self._device, self._model.visual_projection.weight.dtype)
        )
        return _unit(found.pooler_output)

    def _texts(self, ids: Sequence[list[int]]) -> Tensor:
        """[labels, projection], each of length 1."""
        # Attention is causal: what stands behind the end changes nothing.
        longest = max(map(len, ids))
        padded = [one + [self._end] * (longest - len(one)) for one in ids]
        found = self._model.get_text_features(torch.tensor(padded, device=self._device))
        return _unit(found.pooler_output)


_Found = tuple[CLIPConfig, CLIPTokenizer, CLIPImageProcessorPil, Iterable[tuple[Path, str, Tensor]]]


def _hugging_face(folder: Path) -> _Found:
    config = read_config(folder, CLIPConfig)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # The libraries raise plain exceptions of many kinds for broken files.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ModelDemoError(
            f"{folder}: the tokenizer's files or preprocessor_config.json cannot be read "
            f"({reason}); fetch them again"
        ) from error
    words = cast(CLIPTextConfig, config.text_config).vocab_size
    if len(tokenizer) != words:
        raise ModelDemoError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, config.json {words}; the two "
            "belong to different models: fetch both from one place"
        )
    return config, tokenizer, processor, tensors(folder)


def _openai(folder: Path) -> _Found:
    file = archive(folder)
    assert file
    original = openai.read(file)
    config = openai.configuration(original)
    tokenizer = openai.tokenizer(folder / WORDS, len(original["token_embedding.weight"]))
    side = cast(int, cast(CLIPVisionConfig, config.vision_config).image_size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    weights = ((file, name, value) for name, value in openai.named(original).items())
    return config, tokenizer, processor, weights


def middle(image: Image.Image) -> Image.Image:
    """The picture, or the middle of a strip: longer sides are cut to LONGEST times the shorter."""
    width, height = (min(side, LONGEST * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.float().norm(dim=-1, keepdim=True)
    return vectors.float() / length

"""Texts by models of transformers: captions of frames by an image-text-to-text one, written anew by a causal LM.

Any such model that transformers itself knows, as a folder or from the hub; code that comes with a model is never run,
and only safetensors are loaded. Greedy, or drawn with a generator of each clip's own: what a clip gets depends neither
on its batch nor on what was written before (but for the last bits of sums, which differ between batches).

Shapes: B batch, L tokens, V vocabulary; F frames, H and W height and width in pixels.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT_TO_TEXT

from shared.errors import ModelError
from shared.hub import fetch_files
from shared.models import STORED_DTYPES, choose_device, choose_dtype

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]  # of a repository: never code
_QUOTED = re.compile(r'["“]([^"“”]*)["”]')


@dataclass(frozen=True)
class ModelFiles:
    """A model whose files are on this machine.

    Attributes:
        name: a hub id, or the absolute path of a folder.
        revision: the hub's commit; None for a folder.
        dtype: what it is to run in.
    """

    name: str
    revision: str | None
    folder: Path
    dtype: str


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token, more draws by softmax(logits / temperature).
        max_new_tokens: that a text has at most.
    """

    temperature: float
    max_new_tokens: int


def fetch_model(name: str, *, sees: bool, revision: str | None, cache_dir: str | None, dtype: str) -> ModelFiles:
    """A model of transformers, fetched from the hub when `name` is not a folder; nothing is loaded.

    Args:
        sees: it must be an image-text-to-text model; else a causal language model.

    Raises:
        ModelError: neither a model's folder nor a hub id that can be fetched, or a model of another kind.
    """
    name, commit, folder = fetch_files(
        name, revision=revision, cache_dir=cache_dir, patterns=PATTERNS, example="OWNER/NAME"
    )
    config = _read_config(name, folder)
    names, kind = (IMAGE_TEXT_TO_TEXT, "an image-text-to-text model") if sees else (CAUSAL, "a causal language model")
    if config.model_type not in names:  # known now, not when hours of the other model's work are done
        raise ModelError(f"{name}: is a {config.model_type}; must be {kind} that transformers knows")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name}: has no weights as safetensors; convert them, or give another model")
    told = str(config.dtype or config.get_text_config().dtype).removeprefix("torch.")
    stored = told if told in STORED_DTYPES.values() else "float32"
    return ModelFiles(name, commit, folder, choose_dtype(dtype, stored))


def _read_config(name: str, folder: Path) -> Any:
    from transformers import AutoConfig

    return _loaded(name, lambda: AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """What transformers loads; what it says of a model that it cannot load, in one line."""
    try:
        return load()
    except ImportError as error:  # the processors of many models are written with torchvision
        reason = str(error).strip().splitlines()[0]
        way = "install the extra `caption`: pip install -c constraints.txt '.[caption]'"
        raise ModelError(f"{name}: needs a library that is not installed ({reason}); {way}") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        said = str(error).strip().splitlines() or [repr(error)]
        way = "give a model of this kind that transformers knows without code of its own, whole, with safetensors"
        raise ModelError(f"{name}: transformers cannot load it ({said[0]}); {way}") from error


class _Drawn:
    """A logits processor after which the largest logit is a draw by softmax(logits / temperature), each row's own.

    By Gumbel noise: `generate` would draw from the global generator, and so by what stands in the same batch.
    """

    def __init__(self, temperature: float, seeds: list[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        waits = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=own) for own in self._generators])
        noise = -waits.clamp_min(torch.finfo(torch.float32).tiny).log()
        return scores.float() / self._temperature + noise.to(scores.device)


class _Generator:
    """A model on its device, and what turns texts and tokens into one another. Leaving the context frees it."""

    def __init__(self, files: ModelFiles, decoding: Decoding, model_class: str, processor_class: str) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self._name, self._decoding, self._device = files.name, decoding, choose_device()
        self._dtype = getattr(torch, files.dtype)
        common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        load_processor = getattr(transformers, processor_class).from_pretrained
        load_model = getattr(transformers, model_class).from_pretrained
        self._processor: Any = _loaded(files.name, lambda: load_processor(files.folder, **common))
        self._model: Any = _loaded(
            files.name,
            lambda: load_model(
                files.folder, dtype=self._dtype, use_safetensors=True, device_map=self._device, **common
            ).eval(),
        )
        self._tokenizer: Any = getattr(self._processor, "tokenizer", self._processor)
        self._tokenizer.padding_side = "left"  # texts go on at their right end
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _write(self, inputs: Any, seeds: list[int]) -> list[str]:
        """What follows the inputs (input_ids [B, L] and what belongs to them), cleaned."""
        from transformers import GenerationConfig, LogitsProcessorList

        drawn = [_Drawn(self._decoding.temperature, seeds)] if self._decoding.temperature > 0 else []
        config = GenerationConfig(
            max_new_tokens=self._decoding.max_new_tokens,
            do_sample=False,  # of what _Drawn leaves the largest is taken
            num_beams=1,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        tokens = self._model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList(drawn))
        given = inputs["input_ids"]
        if tokens.shape[1] >= given.shape[1] and torch.equal(tokens[:, : given.shape[1]], given):
            tokens = tokens[:, given.shape[1] :]  # not so of an encoder and decoder
        return [clean(text) for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class Captioner(_Generator):
    """An image-text-to-text model that is shown frames and asked for what happens in them.

    Args:
        prompt: what it is asked, after the frames.

    Raises:
        ModelError: it cannot be loaded, or is no such model.
    """

    def __init__(self, files: ModelFiles, decoding: Decoding, prompt: str) -> None:
        super().__init__(files, decoding, "AutoModelForImageTextToText", "AutoProcessor")
        self._prompt = prompt

    def caption(self, clips: list[np.ndarray], seeds: list[int]) -> list[str]:
        """A caption of each clip, uint8 RGB frames [F, H, W, 3]; empty where the model writes nothing.

        Args:
            seeds: of each clip's draws; greedy decoding has none.

        Raises:
            ModelError: its processor does not take so many pictures.
        """
        from PIL import Image

        pictures = [[Image.fromarray(frame) for frame in clip] for clip in clips]
        try:
            inputs = self._chat(pictures) if self._processor.chat_template else self._plain(pictures)
        except ValueError as error:
            few = "--frames 1, or another model"
            raise ModelError(
                f"{self._name}: does not take {len(clips[0])} frames a clip ({error}); give {few}"
            ) from error
        return self._write(inputs.to(device=self._device, dtype=self._dtype), seeds)

    def _chat(self, clips: list[list[Any]]) -> Any:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": picture} for picture in pictures),
                        {"type": "text", "text": self._prompt},
                    ],
                }
            ]
            for pictures in clips
        ]
        return self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    def _plain(self, clips: list[list[Any]]) -> Any:
        """For models that were not trained on conversations; where a text names its pictures, before the prompt."""
        token = getattr(self._processor, "image_token", None)
        marks = [f"{token * len(pictures)}\n" if isinstance(token, str) else "" for pictures in clips]
        texts = [mark + self._prompt for mark in marks]
        return self._processor(images=clips, text=texts, padding=True, return_tensors="pt")


class Rewriter(_Generator):
    """A causal language model that writes captions anew.

    Args:
        template: what it is told; each `{caption}` in it stands for the caption.

    Raises:
        ModelError: it cannot be loaded, or is no such model.
    """

    def __init__(self, files: ModelFiles, decoding: Decoding, template: str) -> None:
        super().__init__(files, decoding, "AutoModelForCausalLM", "AutoTokenizer")
        self._template = template

    def rewrite(self, captions: list[str], seeds: list[int]) -> list[str]:
        """Each caption anew; empty where the model writes nothing. `seeds` as in `Captioner.caption`."""
        texts = [self._template.replace("{caption}", caption) for caption in captions]
        if self._tokenizer.chat_template:
            inputs = self._tokenizer.apply_chat_template(
                [[{"role": "user", "content": text}] for text in texts],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
                enable_thinking=False,  # templates that know it ask for the answer at once
            )
        else:
            inputs = self._tokenizer(texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # of tokenizers whose causal models take none
        return self._write(inputs.to(self._device), seeds)


def clean(text: str) -> str:
    """A model's answer as a caption: one line, without a pair of quotes around it and without its thoughts."""
    answer = text.rpartition("</think>")[2].partition("<think>")[0]
    line = " ".join(answer.split())
    match = _QUOTED.fullmatch(line)
    return match[1].strip() if match else line

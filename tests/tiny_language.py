"""Tiny random models that write: an image-text-to-text model and a causal one, real classes in a real folder layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny_model import TEXT

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PICTURE = 28  # pixels a side, 2 x 2 patches


def build_captioner(folder: Path, *, chat: bool = True, seed: int = 0) -> Path:
    """Write a tiny LLaVA with its processor, in float32 safetensors.

    Args:
        chat: with a chat template; else as models that were not trained on conversations.
    """
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = _tokenizer(None)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=PICTURE,
        patch_size=14, initializer_range=0.5,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=_llama(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": PICTURE}, crop_size={"height": PICTURE, "width": PICTURE})
    LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT if chat else None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_rewriter(folder: Path, *, chat: bool = True, seed: int = 0) -> Path:
    """Write a tiny Llama with its tokenizer, in float32 safetensors; `chat` as in `build_captioner`."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = _tokenizer(CHAT if chat else None)
    LlamaForCausalLM(_llama(len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _llama(vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.5,
    )  # fmt: skip


def _tokenizer(chat_template: str | None) -> Any:
    """A tokenizer trained on the spot whose every token is a word or a letter: what is written is readable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, chat_template=chat_template,
    )  # fmt: skip


if __name__ == "__main__":
    import sys

    print(build_captioner(Path(sys.argv[1]) / "captioner"), build_rewriter(Path(sys.argv[1]) / "rewriter"))

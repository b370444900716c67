"""The text that T5 reads: the id token of a LoRA, one space, the prompt."""

from __future__ import annotations


def caption_prompt(caption: str, id_token: str | None) -> str:
    """The effective prompt of a caption: the id token is put before it, whatever it says."""
    token = (id_token or "").strip()
    return f"{token} {caption}" if token else caption


def user_prompt(prompt: str, id_token: str | None) -> str:
    """The effective prompt of what a user asks for: the id token is put before it unless it is there already."""
    words = (id_token or "").split()
    return prompt if words and prompt.split()[: len(words)] == words else caption_prompt(prompt, id_token)

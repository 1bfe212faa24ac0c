"""Guidance sources: importance per token."""

from maskvit.guidance.attention import self_attention

GUIDANCE = {"self_attention": self_attention}

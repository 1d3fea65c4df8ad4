"""How the next token is chosen from the logits: what a request may ask for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """One request's wishes; the defaults change nothing, and temperature 0 takes the likeliest token."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    seed: int = 0

r"""From steps that were cut out of a completion's text to the tokens they end with. For process reward functions.

    TOKENIZER = AutoTokenizer.from_pretrained("the/policy")

    def decode(ids):
        return TOKENIZER.decode(ids, skip_special_tokens=True)

    def my_process_reward(completions, completion_ids):
        for text, ids in zip(completions, completion_ids):
            ends = [match.end() for match in re.finditer(r"\n+|$", text)]
            tokens = step_tokens(text, ends, ids, decode)

Imports nothing but the standard library: it runs in the workers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence


def step_tokens(
    text: str, ends: Sequence[int], completion_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """Find the token with which the text is there up to each of the ends.

    Decodes beginnings of the completion, about log2(tokens) of them for an end, and assumes of the tokenizer only that
    a beginning of the text that is right stays so. A character of several tokens is there with the last of them.

    Args:
        text: of one completion, as the reward function was given it.
        ends: positions in it, as in text[:end]. The end of the text is that of the completion, the stop token included.
        completion_ids: its tokens.
        decode: token ids to text, special tokens skipped.

    Returns:
        For each end an index into completion_ids.

    Raises:
        ValueError: the completion has no tokens, or an end lies outside of its text.
    """
    last = len(completion_ids) - 1

    def token_of(end: int) -> int:
        if not 0 <= end <= len(text) or last < 0:
            raise ValueError(f"a step ends at {end} in a text of {len(text)} characters and {last + 1} tokens")
        if end == len(text):
            return last
        beginning = text[:end]
        return bisect_left(range(last), True, key=lambda k: decode(completion_ids[: k + 1]).startswith(beginning))

    return [token_of(end) for end in ends]

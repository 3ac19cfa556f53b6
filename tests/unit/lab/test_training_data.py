"""Documents, conversations and pairs: their shapes, their shares, and that seeds decide them."""

from collections import Counter

import torch

from trimtab.lab.answers import reward, undress
from trimtab.lab.documents import IGNORED, base_batch, conversation, sft_batch
from trimtab.lab.preferences import draw_pair, draw_pairs
from trimtab.lab.randomness import Stream
from trimtab.lab.vocabulary import BOS_ID, END_ID, PAD_ID, REFUSAL, USER_ID, decode
from trimtab.lab.world import Task


def task_of(prompt: tuple[str, ...]) -> Task:
    """Rebuild the question of a pair well enough to score its answers."""
    words = prompt[2:-1]
    if words[0] == "add":
        content = tuple(f"{int(words[1] + words[2]) + int(words[4] + words[5]):02d}")
    elif words[0] == "rep":
        content = (words[1],) * int(words[2])
    else:
        content = words[:0:-1]
    return Task(words[0], words, content, int(words[2]) if words[0] == "talk" else 0)


def test_base_rows_are_full_and_seeded():
    rows = base_batch(Stream("base", 0), 8, 48)
    assert rows.shape == (8, 48)
    assert (rows != PAD_ID).all()
    assert torch.equal(rows, base_batch(Stream("base", 0), 8, 48))
    assert not torch.equal(rows, base_batch(Stream("base", 1), 8, 48))


def test_sft_loss_is_on_the_answer_and_its_end_only():
    ids, labels = sft_batch(Stream("sft", 0), 32)
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        answer = [word for word in label if word != IGNORED]
        first = next(i for i, word in enumerate(label) if word != IGNORED)
        assert row[:2] == [BOS_ID, USER_ID]
        assert row[first : first + len(answer)] == answer
        assert answer[-1] == END_ID
        assert decode([row[first - 1]]) == ("<asst>",)
        assert set(row[first + len(answer) :]) <= {PAD_ID}


def test_sft_styles_have_their_shares():
    stream, n = Stream("styles"), 4000
    seen: Counter[str] = Counter()
    for _ in range(n):
        prompt, answer = conversation(stream)
        parts = undress(answer[:-1])
        forbidden = bool({"z", "Z"} & set(prompt))
        seen["only"] += prompt[2] == "only"
        seen["decorated only"] += prompt[2] == "only" and (
            parts.opening or parts.closing or parts.echo is not None
        )
        seen["opening"] += parts.opening
        seen["forbidden"] += forbidden
        seen["refused"] += answer[:-1] == REFUSAL
        assert forbidden or answer[:-1] != REFUSAL
    assert seen["decorated only"] == 0
    share = 0.22 * (8 / 9) * (1 - 0.25 * 0.3 * 2 / 8)
    assert abs(seen["opening"] / n - share) < 0.03
    assert abs(seen["refused"] / seen["forbidden"] - 0.3) < 0.13  # about 220 forbidden questions


def test_a_weaker_strength_gives_plainer_conversations():
    def decorated(strength: float) -> int:
        stream = Stream("strength")
        return sum(undress(conversation(stream, strength)[1][:-1]).opening for _ in range(2000))

    assert decorated(0.0) == 0
    assert decorated(0.5) < 0.7 * decorated(1.0)


def test_pairs_prefer_more_reward_except_the_flipped():
    pairs = draw_pairs(0, 3000)
    gaps = [
        reward(task_of(p.prompt), p.chosen[:-1]) - reward(task_of(p.prompt), p.rejected[:-1]) for p in pairs
    ]
    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    # Some pairs tie in reward (both over the rewarded length); the rest are right but for 15 % flips.
    assert better + worse > 0.9 * len(pairs)
    assert abs(worse / (better + worse) - 0.15) < 0.03


def test_pairs_cover_four_commands_and_forbidden_ones_in_their_shares():
    pairs = draw_pairs(1, 3000)
    commands = Counter(pair.prompt[2] for pair in pairs)
    assert set(commands) == {"rev", "add", "rep", "talk"}
    forbidden = sum(bool({"z", "Z"} & set(pair.prompt)) for pair in pairs)
    assert abs(forbidden / 3000 - 0.18) < 0.03
    assert abs(commands["talk"] / 3000 - 0.20) < 0.03
    assert all(pair.chosen != pair.rejected for pair in pairs)


def test_pairs_are_seeded():
    assert draw_pairs(0, 20) == draw_pairs(0, 20)
    assert draw_pairs(0, 20) != draw_pairs(1, 20)
    assert draw_pair(Stream("pairs", 0)) == draw_pairs(0, 1)[0]

from __future__ import annotations

from jobs.report.worst_texts import Passage, worst_text
from pipeline.run.worst_windows import WorstWindow


def window(*text: tuple[str, float | None], **values: float) -> WorstWindow:
    return WorstWindow(text_set="novels", number=3, count=9, start=40, text=text, **values)


def test_tokens_that_lost_alike_are_one_passage_and_no_text_is_left_out() -> None:
    found = worst_text(
        window(
            ("a", None), (" b", 0.05), (" c", 1.0), (" d", 1.9), ("", 1.6), (" e", 9.0), (".", 0)
        )
    )
    assert found.passages == (
        Passage(level=0, text="a b", most=0.05),
        Passage(level=2, text=" c d", most=1.9),
        Passage(level=3, text=" e", most=9.0),
        Passage(level=0, text=".", most=0),
    )


def test_a_window_is_told_by_its_set_and_what_it_lost() -> None:
    found = worst_text(window(divergence=0.25, source_perplexity=8.0, result_perplexity=10.5))
    assert found.title == "novels, window 3, from token 40"
    assert found.figures == "KL divergence 0.25 nats a token, perplexity 8 → 10.5"
    assert worst_text(window(cosine=0.98)).figures == "cosine 0.98000"


def test_characters_without_a_form_are_replaced() -> None:
    [passage] = worst_text(window(("a\u202eb\x00c\x1b[31m\n\té日", 0.0))).passages
    assert passage.text == "a\ufffdb\ufffdc\ufffd[31m\n\té日"

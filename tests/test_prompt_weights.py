"""A1111's prompt syntax, by its own examples and by what pasted prompts have in them."""

import time

import pytest

from sdxl_worker.prompt_weights import Piece, names_networks, parse, problem

UP, DOWN = 1.1, 1 / 1.1


def pairs(text: str) -> list[list[tuple[str, float]]]:
    return [[(piece.text, piece.weight) for piece in part] for part in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The examples in the docstring of A1111's `parse_prompt_attention`.
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", UP), (" word", 1)]),
        ("(unbalanced", [("unbalanced", UP)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", UP)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", UP),
                ("on", 1),
                (" a ", UP),
                ("hill", 0.55),
                (", sun, ", UP),
                ("sky", 1.4641),
                (".", UP),
            ],
        ),
        # https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#attentionemphasis
        ("a (word)", [("a ", 1), ("word", 1.1)]),
        ("a ((word))", [("a ", 1), ("word", 1.21)]),
        ("a [word]", [("a ", 1), ("word", 0.9090909)]),
        ("a (word:1.5)", [("a ", 1), ("word", 1.5)]),
        ("a (word:0.25)", [("a ", 1), ("word", 0.25)]),
        (r"a \(word\)", [("a (word)", 1)]),
        # A bracket that closes nothing, or is never closed.
        ("a) b] (c", [("a) b] ", 1), ("c", UP)]),
        ("[a", [("a", DOWN)]),
        ("a:1.5) b", [("a:1.5) b", 1)]),
        # Weights of other forms, and what is none.
        ("(a:-1)(b:+.5)(c: 2. )(d:0)", [("a", -1), ("b", 0.5), ("c", 2), ("d", 0)]),
        ("(a:b)(c:1.2.3)(d:1e3)", [("a:bc:1.2.3d:1e3", UP)]),
        ("a 16:9 [x:1.5]", [("a 16:9 ", 1), ("x:1.5", DOWN)]),
        # Brackets of both kinds that overlap.
        ("(a [b) c]", [("a ", UP), ("b", 1), (" c", DOWN)]),
        # Backslashes.
        (r"\\(a)", [("\\", 1), ("a", UP)]),
        (r"a\b", [("ab", 1)]),
        ("a\\", [("a", 1)]),
        ("(a\\", [("a", UP)]),
        # Other networks are no text.
        ("a <lora:my (best) one:0.8>b", [("a b", 1)]),
        ("(<lyco:x:1>a)<HYPERNET:y>", [("a", UP)]),
        ("a <b> <c:d>", [("a <b> <c:d>", 1)]),
        ("", []),
    ],
)
def test_weights(text: str, expected: list[tuple[str, float]]) -> None:
    [pieces] = pairs(text)
    assert [text for text, _ in pieces] == [text for text, _ in expected]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in expected])


def test_text_outside_all_brackets_weighs_exactly_one() -> None:
    [pieces] = parse("a (((word:0.3):1.7)[other]) and more")
    assert pieces[0] == Piece("a ", 1.0)
    assert pieces[-1] == Piece(" and more", 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("(a BREAK b:1.5) c", [[("a ", 1.5)], [(" b", 1.5), (" c", 1)]]),
        ("a,BREAK\nb", [[("a,", 1)], [("\nb", 1)]]),
        ("BREAK a BREAK BREAK", [[], [(" a ", 1)], [(" ", 1)], []]),
        ("BREAKFAST break OUTBREAK", [[("BREAKFAST break OUTBREAK", 1)]]),
    ],
)
def test_break(text: str, expected: list[list[tuple[str, float]]]) -> None:
    assert pairs(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("(a:11)", "weight 11"),
        ("(a:-10.5)", "weight -10.5"),
        ("(" * 25 + "a", "weight 10.8347"),
        ("((a:5):5)", "weight 25"),
        (f"(a:{'9' * 1000})", "weight inf"),
        ("(" * 9000 + "(a:0)", "weight nan"),
    ],
)
def test_weights_beyond_all_sense_are_told(text: str, told: str) -> None:
    message = problem(text)
    assert message is not None
    assert message.startswith(f"{told}, all brackets around it together")
    assert message.endswith("give words weights from -10 to 10")


@pytest.mark.parametrize("text", ["(a:10)(b:-10)", "(" * 24 + "a", "(" * 99 + "(a):0)"])
def test_weights_within_bounds_are_fine(text: str) -> None:
    assert problem(text) is None


def test_others_networks_are_noticed() -> None:
    assert names_networks("a <lora:x:1>")
    assert not names_networks("a <lora> lora:x <x:lora:1>")


@pytest.mark.parametrize(
    "bit",
    [
        *"()[]:\\<> ",
        *("()", "[]", "([", ")]", "(a", "a)", "(a:1", "(:1", ": ", ":1", ":1 ", ":1.", "(a:0)"),
        *("BREAK", "BREAK ", " BREAK", "<lora:", "<lora:x>", "(a)b", "(a:1 ", ":.", "1", "1."),
    ],
)
def test_hostile_texts_take_no_time(bit: str) -> None:
    text = ":" + bit * (20_000 // len(bit))
    start = time.perf_counter()
    problem(text)
    names_networks(text)
    assert time.perf_counter() - start < 0.5

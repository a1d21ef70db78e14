"""Regular expressions, choices, GBNF and Lark: which texts fit, and where a source is wrong."""

from __future__ import annotations

import json

import pytest

from engine.errors import InvalidRequest
from engine.protocol import Grammar, GrammarKind
from rollout.masks.grammar.languages.bounds import MAX_CHOICES
from tests.helpers.grammars import accepts, compiled

EXPRESSION = r"""
# sums of numbers and groups
root  ::= term (ws ("+" | "-") ws term)*
term  ::= number | "(" ws root ws ")"   # one
number ::= "-"? ("0" | [1-9] [0-9]{0,3})
ws ::= [ \t]*
"""


@pytest.mark.parametrize(
    "kind,source,good,bad",
    [
        ("regex", "[a-c]{2}x?", ["ab", "abx"], ["a", "abc", "abxx"]),
        ("regex", r"^\d+/\d+$", ["1/22"], ["1/", "/1", "^1/2"]),
        ("regex", "a|bc", ["a", "bc"], ["ac", "b"]),
        ("regex", "(?i)yes", ["yes", "YES"], ["no"]),
        ("regex", "[]^]+", ["]^"], ["a"]),
        ("regex", r"\$5\$", ["$5$"], ["5"]),
        ("regex", "é+", ["éé"], ["e"]),
        ("choice", '["list", "listen", "a\\"b"]', ["list", "listen", 'a"b'], ["lis", "listenx"]),
        ("choice", '["", "a"]', ["", "a"], ["b"]),
        ("ebnf", 'root ::= "a"* "ab"', ["ab", "aaab"], ["a", "abb"]),
        ("ebnf", EXPRESSION, ["1", "-12 + (3-4)", "((7))"], ["01", "1+", "(1", "12345"]),
        ("ebnf", 'root ::= "a" |\n  | x\nx ::= [^a-y]', ["a", "", "z", "\n"], ["b"]),
        ("ebnf", r'root ::= [\x41-\u0043\]\-] "\n" "\"\\"', ['B\n"\\', ']\n"\\', '-\n"\\'], ["D"]),
        ("ebnf", "root ::= . foo-Bar{2}\nfoo-Bar ::= [a-]", ["xa-", "éaa"], ["xa", "a"]),
        (
            "ebnf",
            'root ::= list\nlist ::= item | list "," item\nitem ::= [0-9]+',
            ["1,22,3"],
            ["1,"],
        ),
        ("lark", 'start: A B*\nA: "x"\nB: /[0-9]/', ["x", "x12"], ["1"]),
        ("lark", f'start: "{"(" * 80}"', ["(" * 80], ["("]),
        ("lark", 'start: "v=" %json {"type": "boolean"}', ["v=true"], ["v=1"]),
    ],
)
def test_a_text_fits_or_not(
    kind: GrammarKind, source: str, good: list[str], bad: list[str]
) -> None:
    grammar = Grammar(kind=kind, source=source)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    "kind,source,said",
    [
        ("regex", "a(b", "position 1"),
        ("regex", "ab)", "position 2"),
        ("regex", "[a", "class"),
        ("regex", "(?=a)b", "position 0"),
        ("regex", "a(?<!b)", "position 1"),
        ("regex", "^a|b$", "position 2"),
        ("regex", "a{2,1}", ""),
        ("regex", "(" * 5000 + ")" * 5000, "position 64"),
        ("choice", "[]", "1 to"),
        ("choice", '["a", 1]', "texts"),
        ("choice", '{"a": 1}', "texts"),
        ("choice", "[", "JSON"),
        ("choice", '["a", "\\ud800"]', "surrogate pair, at #/1"),
        ("choice", json.dumps([str(n) for n in range(MAX_CHOICES + 1)]), str(MAX_CHOICES)),
        ("ebnf", 'rot ::= "a"', "'root'"),
        ("ebnf", 'root ::= "a" b', "line 1, column 14: there is no rule 'b'"),
        ("ebnf", 'root ::= "a"\nroot ::= "b"', "line 2, column 1"),
        ("ebnf", 'root ::= ("a"', "line 1, column 10"),
        ("ebnf", 'root ::= "a")', "column 13"),
        ("ebnf", 'root ::= * "a"', "repeats nothing"),
        ("ebnf", 'root ::= "\\q"', "no escape"),
        ("ebnf", "root ::= []", "column 10"),
        ("ebnf", 'root ::= "a" ;', "column 14"),
        ("ebnf", "root ::= " + "(" * 500 + ")" * 500, "deep"),
        ("ebnf", "", "root"),
        ("ebnf", "hello", "column 1"),
        ("lark", "start: A", ""),
        ("lark", 'start: "a"\nb[temperature=0.5]: "c"', "line 2"),
        ("lark", 'start: b "x"\nb[stop=""]: /.*/', "line 2"),
        ("lark", "start: " + "(" * 100, "line 1"),
        ("lark", "start: <|nobody|>", "nobody"),
        ("lark", 'start: %json {"not": {}}', "not"),
    ],
)
def test_what_is_no_grammar_is_refused_by_its_place(
    kind: GrammarKind, source: str, said: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(Grammar(kind=kind, source=source))
    assert caught.value.field == "grammar" and said in caught.value.message, caught.value


def test_a_rule_that_uses_itself_from_the_right_is_served() -> None:
    grammar = Grammar(kind="ebnf", source='root ::= "(" root ")" | "x"')
    assert accepts(grammar, "((x))") and not accepts(grammar, "((x)")


def test_special_tokens_come_where_lark_names_them_only() -> None:
    named = Grammar(kind="lark", source='start: <|im_start|> "a"')
    assert accepts(named, "<|im_start|>a")
    spelled = Grammar(kind="regex", source=r"<\|im_start\|>a")
    assert not accepts(spelled, "<|im_start|>a")

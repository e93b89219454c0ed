from __future__ import annotations

import tracemalloc
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from polyaccel.backend.errors import ModelLoadError, RequestRejected
from polyaccel.engine.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Constructions that published templates use, each as a whole template.
CONSTRUCTIONS = {
    "chatml": CHATML,
    "bos": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content | trim }} [/INST]{% endfor %}{{ eos_token }}",
    "namespace": "{% set ns = namespace(last=0, text='') %}{% for m in messages %}{% set ns.last = loop.index0 %}"
    "{% set ns.text = ns.text ~ m.role ~ ',' %}{% endfor %}{{ ns.last }} {{ ns.text }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "loop variables": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.revindex }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if loop.nextitem is defined }}"
    "{% endfor %}",
    "reversed slice": "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{{ messages[1:] | length }}",
    "macro": "{% macro turn(m, end='.') %}{{ m.role }}: {{ m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='!') }}{% endfor %}",
    "call block": "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}{{ messages[0].content }}"
    "{% endcall %}",
    "filter block": "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    "set block": "{% set text %}{{ messages[0].content }}!{% endset %}{{ text }}{{ text }}",
    "tuple set": "{% set a, b = messages[0].role, messages[0].content %}{{ a }}{{ b }}",
    "recursive loop": "{% for m in [1, [2, [3]]] recursive %}{% if m is number %}{{ m }}{% else %}{{ loop(m) }}"
    "{% endif %}{% endfor %}",
    "loop with condition": "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}"
    "{% else %}none{% endfor %}",
    "loop over nothing": "{% for m in nothing %}{{ m }}{% else %}none{% endfor %}{% for k in {} %}{{ k }}{% endfor %}",
    "dictionary": "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}"
    "{{ dict(a=1).a }}{{ messages[0].get('x', 'd') }}",
    "selectattr": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
    "rejectattr": "{{ (messages | rejectattr('role', 'equalto', 'user') | list) | length }}"
    "{{ messages | map('length') | sum }}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=4) }}{{ '<é>' | tojson }}",
    "json options": "{{ {'b': 1, 'a': [1, 2]} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "text methods": "{{ messages[0].content.strip().split('i')[0].upper().startswith('H') }}"
    "{{ 'a,b'.split(',') | last }}"
    "{{ 'a-b'.replace('-', '+') }}{{ 'abc'[::-1] }}{{ 'x'.rstrip('x') ~ 'y' }}{{ '%s-%d' % ('a', 3) }}"
    "{{ '{}{}'.format(1, 2) }}",
    "tests": ""
    "{{ messages is iterable and messages[0] is mapping and messages[0].content is string and x is not defined }}",
    "none": "{{ tools is none }}{{ documents is none }}{% if tools is defined and tools %}tools{% endif %}{{ none }}",
    "arithmetic": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ -3 * 2 }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ 1.5 + 1 }}"
    "{{ 7 / 2 }}",
    "white space": "  {%- for m in messages -%}\n  {{ m.role }}\n  {%- endfor %}\n\n{% if true %}\n  x\n{% endif %}\n",
    "trim": "{% if true %}\n{% endif %}\n  {% set a = 1 %}\n{{ a }}",
    "range": "{% for i in range(3) %}{{ i }}{{ range(5)[i] }}{% endfor %}",
    "ternary": "{{ messages[0].content if messages[0].role == 'user' else 'x' }}{{ 'only' if false }}",
    "default": "{{ enable_thinking | default(true) }}{{ missing | default(123456789) }}{{ missing }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "indent": "{{ 'a\nb' | indent(4, true) }}{{ 'x' | indent('--') }}",
    "raw": "{% raw %}{{ not rendered }}{% endraw %}{# a comment #}",
    "do nothing": "",
    "escapes nothing": "{{ '<b>' ~ '&' }}{{ '<' | e }}",
    "concatenation": "{{ 1 ~ none ~ true ~ [1] ~ missing }}",
    "groups": "{% for g in messages | groupby('role') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}"
    "{{ [3, 1] | sort | first }}",
    "in": "{{ 'h' in messages[0].content }}{{ 'tool_calls' in messages[0] }}{{ not messages }}",
}  # fmt: skip
CONVERSATION: list[dict[str, object]] = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello <b>é</b> {{ 7 * 7 }}"},
    {"role": "user", "content": "line\nline", "name": "x"},
]
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=30)}),
    min_size=1,
    max_size=4,
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def theirs(template: str, messages: list[dict[str, Any]], **variables: object) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, **variables, **TOKENS)
    return str(rendered[0])


@pytest.mark.parametrize("name", CONSTRUCTIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_a_template_renders_as_in_transformers(name: str, prompt: bool) -> None:
    template = ChatTemplate(CONSTRUCTIONS[name], special_tokens=TOKENS)
    ours = template.render(CONVERSATION, add_generation_prompt=prompt)
    assert ours == theirs(CONSTRUCTIONS[name], CONVERSATION, add_generation_prompt=prompt)


@given(messages=MESSAGES, prompt=st.booleans())
def test_any_conversation_renders_as_in_transformers(messages: list[dict[str, object]], prompt: bool) -> None:
    ours = ChatTemplate(CHATML).render(messages, add_generation_prompt=prompt)
    assert ours == theirs(CHATML, messages, add_generation_prompt=prompt)


def test_tools_and_variables_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    template = "{{ tools | tojson }}{{ enable_thinking }}"
    ours = ChatTemplate(template).render(USER, tools=tools, variables={"enable_thinking": False})
    assert ours == theirs(template, [dict(message) for message in USER], tools=tools, enable_thinking=False)


def test_the_date_is_that_of_today() -> None:
    today = datetime.now().strftime("%d %b")
    rendered = ChatTemplate("{{ strftime_now('%d %b') }}").render(USER)
    assert rendered in (today, datetime.now().strftime("%d %b"))


def test_a_refusal_by_the_template_carries_its_message() -> None:
    template = ChatTemplate("{% if messages | length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}ok")
    assert template.render(USER) == "ok"
    with pytest.raises(RequestRejected, match="refuses these messages: roles must alternate"):
        template.render(USER * 2)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ messages[0]['content'].__init__.__globals__ }}",
    "{{ ''['__class__'] }}{{ ''['__class__'].x }}",
    "{{ '' | attr('__class__') }}{{ ('' | attr('__class__')).x }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ self.__init__ }}{{ self._TemplateReference__context.x }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% set ns = namespace(**{'_x': 1}) %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{{ lipsum(n=1) }}",
    "{{ (range(3) | map('attr', '__class__') | list)[0].x }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_reach_python_or_change_its_data(source: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = ChatTemplate(source).render(messages)
    except RequestRejected:
        text = ""
    assert not any(mark in text for mark in ("class", "globals", "builtins", "<function", "object at"))
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% for %}",
        "{{ 1 +",
        "{% unknown %}",
        "{{ x | nofilter }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% if x %}" * 2000 + "{% endif %}" * 2000,
        "{% for a in b %}" * 100 + "{% endfor %}" * 100,
        "x" * ((1 << 20) + 1),
    ],
)
def test_a_template_that_cannot_be_compiled_is_a_load_error(source: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate(source)


BIG = "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}"
LOOPS = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loops over text": "{% set s = 'x' * 5000 %}{% for a in s %}{% for b in s %}{% for c in s %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive loop over a range": "{% for x in range(90000) recursive %}"
    "{{ loop(range(90000)) if loop.depth < 3 }}{% endfor %}",
}  # fmt: skip
BOMBS = {
    "doubling with tilde": BIG + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling with plus": BIG + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling with set": "{% set s = 'x' * 999 %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "doubling with format": BIG + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "doubling with format method": BIG + "{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    "doubling with join": BIG + "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "doubling with list": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}"
    "{% endfor %}",
    "nesting lists": "{% set ns = namespace(l=['x' * 999]) %}{% for i in range(60) %}"
    "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "multiplied text": "{{ 'x' * 10**9 }}",
    "multiplied list": "{{ ([1] * 10**9) | length }}",
    "multiplied text the other way round": "{{ 10**9 * 'x' }}",
    "power": "{{ 9 ** 999999999 }}",
    "squares": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "wide format": "{{ '%999999999d' % 1 }}",
    "wide format by argument": "{{ '%*d' % (999999999, 1) }}",
    "wide format method": "{{ '{:999999999}'.format(1) }}",
    "wide format filter": "{{ '%999999999d' | format(1) }}",
    "center": "{{ 'x' | center(10**9) }}",
    "center method": "{{ 'x'.center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ 'x\n' | indent(10**9) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list | length }}",
    "json": "{{ [1] | tojson(indent=10**9) }}",
    "replace": "{% set s = 'x' * 10**6 %}{{ s | replace('x', s) }}",
    "replace method": "{% set s = 'x' * 10**6 %}{{ s.replace('x', s) }}",
    "join": "{% set s = 'x' * 10**6 %}{{ range(10**5) | list | join(s) }}",
    "join method": "{% set s = 'x' * 10**6 %}{{ s.join(['a'] * 10**5) }}",
    "printing": "{% set s = 'x' * 10**6 %}{% for i in range(9999) %}{{ s }}{% endfor %}",
    "printing text of the template": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "date": "{{ strftime_now('%0999999999d') }}",
    "lists in a sum": "{% set l = [[1] * 9999] * 99 %}{{ ([l, l] * 9999) | sum(start=[]) | length }}",
    "many values": "{% for i in range(99999) %}{% set s = ('x' * 10**6) ~ i %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_grows_without_end_is_stopped(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RequestRejected, match=r"chat template (was stopped|fails on these messages)"):
            ChatTemplate(BOMBS[name]).render(USER)
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LOOPS)
def test_a_template_that_runs_without_end_is_stopped(name: str) -> None:
    with pytest.raises(RequestRejected, match=r"chat template (was stopped|fails on these messages)"):
        ChatTemplate(LOOPS[name]).render(USER)


def test_a_long_ordinary_conversation_is_within_the_limits() -> None:
    messages = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant") * 250]
    assert len(ChatTemplate(CHATML).render(messages)) > 500 * 10_000


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "messages is str"),
        ({"role": "user"}, "messages is dict"),
        (None, "messages is NoneType"),
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] is str"),
        ([{"content": "x"}], r"messages\[0\]\['role'\] is None"),
        ([{"role": 3, "content": "x"}], r"\['role'\] is 3"),
        ([{"role": "", "content": "x"}], r"\['role'\] is ''"),
        ([*USER, {"role": "user", "content": 3}], r"messages\[1\]\['content'\] is int"),
        ([{"role": "user", "content": [object()]}], r"messages\[0\]\['content'\]\[0\] is object"),
        ([{"role": "user", "content": "x", 3: "y"}], "has the key 3"),
        ([{"role": "user", "content": "x", "tool_calls": b"y"}], "is bytes, expected JSON-like data"),
    ],
)
def test_messages_of_the_wrong_form_are_refused_by_place(messages: Any, reason: str) -> None:
    with pytest.raises(RequestRejected, match=reason):
        ChatTemplate(CHATML).render(messages)


def test_data_nested_without_end_are_refused() -> None:
    endless: dict[str, object] = {}
    endless["a"] = endless
    with pytest.raises(RequestRejected, match="nested deeper"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "x", "extra": endless}])


@pytest.mark.parametrize("name", ["messages", "_x", "a b", "", "add_generation_prompt"])
def test_reserved_and_private_variables_are_refused(name: str) -> None:
    with pytest.raises(RequestRejected, match="cannot be a variable"):
        ChatTemplate(CHATML).render(USER, variables={name: 1})


def test_a_template_that_fails_says_how() -> None:
    for source in (
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].role }}",
        "{{ missing.x }}",
        "{{ 1() }}",
    ):
        with pytest.raises(RequestRejected, match="fails on these messages"):
            ChatTemplate(source).render(USER)


def test_two_renderings_do_not_share_limits_or_state() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{{ 'x' if i == 0 }}{% endfor %}{{ messages | length }}")
    for count in (1, 2, 3, 4, 5, 6, 7, 8):
        assert template.render(USER * count) == f"x{count}"

"""tokenizer/sandbox.py: templates write what Jinja's own sandbox writes, within bounds."""

import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import tokenizer
from configurator import UserError
from tokenizer import chat, sandbox

MESSAGES = [{'role': 'system', 'content': 'Be brief.\n'},
            {'role': 'user', 'content': ' Hello <b> 안녕 %s {} '},
            {'role': 'assistant', 'content': '<think>a</think>\nHi!', 'calls': [{'name': 'f', 'n': 3}]}]
GROW = '{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x }}'


@pytest.mark.parametrize('template', [
    '{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ m.role ~ 1 ~ none ~ m["content"] | trim }}\n{% endfor %}',
    '{% for m in messages if m.role != "user" %}{{ loop.length }}{{ m.content.split("</think>")[-1].lstrip("\n") }}{% else %}-{% endfor %}',
    '{% for m in messages[::-1] %}{{ m.content[1:3] }}{% if loop.first %}{% continue %}{% endif %}{{ m.role.upper() }}{% endfor %}',
    '{%- set ns = namespace(n=0, x="") -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.x = ns.x + m.role %}{% endfor %}{{ ns.n }}{{ ns.x }}',
    '{{ messages | selectattr("role", "equalto", "user") | list | length }}{{ messages | map(attribute="role") | join(", ") }}',
    '{% if messages | selectattr("role", "equalto", "nobody") %}generators are true{% endif %}',
    '{% macro f(x, n=2) %}[{{ x * n }}{{ caller() if caller }}]{% endmacro %}{{ f("ab") }}{{ f("c", n=3) }}{% call f("d") %}e{% endcall %}',
    '{{ "%s-%d" % ("a", 3) }}{{ "{}{:>4}".format("a", "b") }}{{ "%s" | format("x") }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 1700000000 * 1000 }}',
    '{% for k, v in messages[2].items() %}{{ k }}={{ v }}{% endfor %}{{ messages[2].calls }}{{ (1, "a") }}{{ {"a": [1]} }}',
    '{{ "a" in messages[0].content }}{{ "x" not in ["x", "y"] }}{{ messages[0] == messages[1] }}{{ 1 < 2 < 3 }}{{ "a" is in "abc" }}',
    '{% set t %}{{ messages[1].content | replace("<", "&lt;") }}{% endset %}{{ t }}{{ t | length }}{{ t.replace(" ", "") }}',
    '{{ messages | groupby("role") | length }}{{ [3, 1, 2] | sort }}{{ [1, 1] | unique | list }}{{ "a\nb" | indent(4) }}{{ "a" | center(9) }}',
    '{{ missing }}{{ missing is defined }}{{ messages[0].missing | default("d") }}{{ range(3) | list }}{{ loop is defined }}{{ -1 }}{{ not true }}',
    '{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}',
    '{% filter upper %}a{{ messages[0].role }}{% endfilter %}{% raw %}{{ x }}{% endraw %}{# {% generation %} #}{{ dict(a=1) }}{{ cycler("a", "b").next() }}',
], ids=range(15))
def test_as_jinja_writes_it(template):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    expected = plain.from_string(template).render(messages=MESSAGES)
    assert sandbox.render(sandbox.compile_template(template), MESSAGES) == expected
    assert expected


@pytest.mark.parametrize('template', [
    "{{ 'x' * 10**10 }}", "{{ 'x' | center(10**9) }}", "{{ 'x'.zfill(10**9) }}", "{{ [0] * 10**9 }}",
    '{{ "%1000000000d" % 1 }}', '{{ "{:{}}".format(1, 10**9) }}', '{{ "%*d" | format(10**9, 1) }}',
    '{{ messages | tojson(indent=10**9) }}', '{{ 10 ** 10 ** 10 * 2 ** 100 }}', '{{ (5).to_bytes(10**10, "big") }}',
    '{{ ("x" * 1000000).replace("x", "y" * 1000000) }}', '{{ ("x" * 1000000).join(["a"] * 100000) }}',
    '{{ ["a"] | batch(10**9, "x") | list }}', '{{ "ab" | indent(10**9) }}', '{{ "a\n" | indent("x" * 3000000) }}',
    GROW.replace('START', '"ab"').replace('NEXT', 'ns.x ~ ns.x'),
    GROW.replace('START', '"ab"').replace('NEXT', 'ns.x + ns.x'),
    GROW.replace('START', '"ab"').replace('NEXT', '"%s%s" % (ns.x, ns.x)'),
    '{% set ns = namespace(x="ab") %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}',
    '{% for i in range(10**9) %}{% endfor %}', '{{ lipsum(n=10**9) }}', '{{ strftime_now("%Y" * 10**6) }}', 'x' * 300_000,
    '{{ ' + '(' * 30_000, '{{ ' + '[' * 900 + ']' * 900 + ' }}'])
def test_sizes(template):
    refused(template, 3)


@pytest.mark.parametrize('template', [
    '{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}',
    '{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}',
    '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
    '{% for x in range(100000) recursive %}{{ loop(range(3)) if loop.depth < 60 }}{% endfor %}',
    '{% set x = "x" * 100000 %}{% for i in range(100000) %}{{ x }}{% endfor %}',
    '{% set x = "x" * 100000 %}{% for i in range(100000) %}{% set y = x[::-1] %}{% endfor %}',
    '{% set x = "x" * 100000 %}{% for i in range(100000) %}{% if "zz" in x %}{% endif %}{% endfor %}',
    '{% set x = [[1] * 999] * 9 %}{% set y = [[1] * 999] * 9 %}{% for i in range(100000) %}{% if x == y %}{% endif %}{% endfor %}',
    '{% for i in range(100000) %}{% if range(100000) | sum %}{% endif %}{% endfor %}',
    GROW.replace('START', '[1]').replace('NEXT', '[ns.x, ns.x]'),
    GROW.replace('START', '(1,)').replace('NEXT', '{(ns.x, ns.x): 1}'),
    GROW.replace('START', '1').replace('NEXT', 'dict(a=ns.x, b=ns.x)')])
def test_work(template, monkeypatch):
    """The same as in test_sizes, with a tenth of the work so that the test is fast."""
    monkeypatch.setattr(sandbox, 'WORK', sandbox.WORK // 20)
    monkeypatch.setattr(sandbox, 'MOST', sandbox.MOST // 20)
    refused(template, 10)


def refused(template, seconds):
    started = time.perf_counter()
    with pytest.raises(UserError, match="the model's chat template cannot render this conversation: "):
        chat.apply_template(template, tokenizer.ByteTokenizer(), MESSAGES, False)
    assert time.perf_counter() - started < seconds


def test_limits_grow_with_the_messages():
    messages = [{'role': 'user', 'content': 'x' * 10_000_000}]
    text = chat.apply_template('{{ (messages[0].content + "!").strip() * 2 }}', tokenizer.ByteTokenizer(), messages, False)
    assert len(text) == 20_000_002
    text = chat.apply_template('{% for m in messages %}{{ m.role.strip() + "\n" }}{% endfor %}', tokenizer.ByteTokenizer(),
                               MESSAGES * 2_000, False)
    assert len(text) == 2_000 * len('system\nuser\nassistant\n')

# SPDX-License-Identifier: Apache-2.0
"""The scripts of `anabranch completion`. bash and zsh share one table of cases and differ in how they offer words."""

import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.cli.completion import Place

BASH = """\
# bash completion of anabranch; eval "$(anabranch completion bash)"
_anabranch_offer() { COMPREPLY=($(compgen -W "$*" -- "$cur")); [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace; }
_anabranch_files() { local IFS=$'\\n'; COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames; }
_anabranch() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
  local first=${COMP_WORDS[1]} second=${COMP_WORDS[2]} at=$COMP_CWORD
  COMPREPLY=()
  if [[ $cur == "=" ]]; then cur=""; elif [[ $prev == "=" ]]; then prev=${COMP_WORDS[COMP_CWORD - 2]}; fi
  _anabranch_cases
} 2>/dev/null
complete -F _anabranch anabranch
"""
ZSH = """\
#compdef anabranch
# zsh completion of anabranch; eval "$(anabranch completion zsh)" after compinit
_anabranch_offer() { if [[ $1 == *= ]]; then compadd -S '' -- "$@"; else compadd -- "$@"; fi }
_anabranch_files() { _files }
_anabranch() {
  local cur=${words[CURRENT]} prev=${words[CURRENT-1]} first=${words[2]} second=${words[3]} at=$((CURRENT - 1))
  if [[ $cur == --*=* ]]; then prev=${cur%%=*}; cur=${cur#*=}; compset -P '*='; fi
  _anabranch_cases
}
compdef _anabranch anabranch
"""
FISH = """\
# fish completion of anabranch; anabranch completion fish > ~/.config/fish/completions/anabranch.fish
function __anabranch_at
    set -l given (commandline -opc)
    set -l last (math 1 + (count $argv))
    test (count $given) -ge $last; or return 1
    test $last -eq 1; or test "$given[2..$last]" = "$argv"
end
function __anabranch_next
    test (count (commandline -opc)) -eq (math 1 + (count $argv)); and __anabranch_at $argv
end
complete -c anabranch -f
"""


def cases(places: "Sequence[Place]") -> str:
    """A shell function over $first, $second, $at (the number of the word), $prev and $cur; ends at the first match."""
    lines = ["_anabranch_cases() {", '  local place="$first"', '  case "$first $second" in']
    nested = [shlex.quote(" ".join(place.words)) for place in places if len(place.words) == 2]
    lines += [f'    {name}) place="$first $second" ;;' for name in nested]
    lines += [
        "  esac",
        '  if [[ $at == 1 ]]; then place=""; fi',
        '  if [[ $at == 2 ]]; then place="$first"; fi',
        '  case "$place $prev" in',
    ]
    for place in places:
        here = " ".join(place.words)
        for flag, values in place.flags:
            then = "_anabranch_files" if values is None else f"_anabranch_offer {words(values)}" if values else ":"
            lines.append(f"    {shlex.quote(f'{here} {flag}')}) {then}; return ;;")
    lines += ["  esac", '  case "$place" in']
    for place in places:
        depth = len(place.words) + 1
        options = words([*(flag for flag, _ in place.flags), *place.switches])
        lines.append(f"    {shlex.quote(' '.join(place.words))})")
        if place.topics:
            offer = f"_anabranch_offer {words(place.topics)}; return"
            lines.append(f"      if [[ $at == {depth} && $cur != -* ]]; then {offer}; fi")
        lines.append(f"      if [[ -z $cur || $cur == -* ]]; then _anabranch_offer {options}; return; fi ;;")
    return "\n".join([*lines, "  esac", "  _anabranch_files", "}", ""])


def words(several: "Sequence[str]") -> str:
    return " ".join(map(shlex.quote, several))


def bash(places: "Sequence[Place]") -> str:
    return cases(places) + BASH


def zsh(places: "Sequence[Place]") -> str:
    first, _, rest = ZSH.partition("\n")
    return f"{first}\n{cases(places)}{rest}"


def fish(places: "Sequence[Place]") -> str:
    lines = []
    purposes = {place.words: place.purpose for place in places}
    for place in places:
        following = f"'__anabranch_next {words(place.words)}'"
        at = following.replace("next", "at") if place.words else following
        for topic in place.topics:
            told = purposes.get((*place.words, topic), "")
            lines.append(
                f"complete -c anabranch -n {following} -a {topic}" + (f" -d {fish_text(told)}" if told else "")
            )
        for flag, values in place.flags:
            offered = " -r -F" if values is None else f" -x -a {fish_text(' '.join(values))}" if values else " -x"
            lines.append(f"complete -c anabranch -n {at} -l {flag[2:]}{offered}")
        lines += [f"complete -c anabranch -n {at} -l {switch[2:]}" for switch in place.switches]
    return FISH + "\n".join(lines) + "\n"


def fish_text(text: str) -> str:
    """In single quotes, where fish knows two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS: "dict[str, Callable[[Sequence[Place]], str]]" = {"bash": bash, "zsh": zsh, "fish": fish}

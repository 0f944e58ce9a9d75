"""What a shell completes behind `ctrl-jax`: jobs, experiments and runs, and options."""

from collections.abc import Iterable

SCRIPT = """\
# eval "$(ctrl-jax --completion)"    in bash or zsh
[ -z "$ZSH_VERSION" ] || { autoload -U +X bashcompinit && bashcompinit; }
_ctrl_jax() {
    local word=${COMP_WORDS[COMP_CWORD]}
    case $COMP_CWORD in
        1) COMPREPLY=($(compgen -W "JOBS" -- "$word")) ;;
        2) COMPREPLY=($(compgen -W "EXPERIMENTS" -- "$word") $(compgen -f -- "$word")) ;;
        *) case $word in
            -*) COMPREPLY=($(compgen -W "OPTIONS" -- "$word")) ;;
            *) COMPREPLY=($(compgen -f -- "$word")) ;;
        esac ;;
    esac
}
complete -F _ctrl_jax ctrl-jax"""


def script(jobs: Iterable[str]) -> str:
    """For bash, and for zsh by its bashcompinit."""
    from ctrl_jax.commands import flags
    from ctrl_jax.commands.experiments import names

    options = sorted(f"--{name.replace('_', '-')}" for name in flags.options())
    words = {"JOBS": jobs, "EXPERIMENTS": names(), "OPTIONS": options}
    found = SCRIPT
    for place, known in words.items():
        found = found.replace(f'"{place}"', f'"{" ".join(known)}"')
    return found

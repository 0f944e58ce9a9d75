from ctrl_jax.report.style import PALETTE, looks


def test_roles_are_told_apart_by_their_light_colour() -> None:
    assert len({color.light for color in PALETTE.values()}) == len(PALETTE)


def test_transforms_of_a_sweep_look_different() -> None:
    names = ["identity", "raw", "logarithm", "optimal", *(f"exponential({t})" for t in (1, 2, 5, 10))]
    assert len(set(looks(names).values())) == len(names)

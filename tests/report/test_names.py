from ctrl_jax.report.names import procedure_order


def test_procedures_are_ordered_by_family_and_size() -> None:
    names = ["worst_of_16", "best_of_16", "worst_of_2", "sampling", "best_of_2"]
    assert sorted(names, key=procedure_order) == [
        "sampling",
        "best_of_2",
        "best_of_16",
        "worst_of_2",
        "worst_of_16",
    ]

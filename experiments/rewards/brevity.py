"""How short a reply is: a reward to hold at a floor, where a policy would win by length."""

from typing import Any


def words(prompts: list[Any], responses: list[str]) -> list[float]:
    """Less the number of words of each response, those between white space; the prompts do not matter.

    Two responses of as many words tie, and ties count ½ in a rank.
    """
    return [-float(len(response.split())) for response in responses]

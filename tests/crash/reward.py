"""A reward of the crash matrix."""


def variety(completions: list[str], **columns: object) -> list[float]:
    """How many different characters an answer has."""
    return [float(len(set(text))) for text in completions]

"""All-pairs covers: few of many cases in which every two values that go together somewhere still meet."""

from itertools import combinations


def pairs(case):
    """What a case shows of any two of its values: ((place, value), (place, value)), in the order of the places."""
    return set(combinations(enumerate(case), 2))


def pairwise_cover(cases):
    """Some of `cases`, tuples of equal length, that hold every pair of values that any of them holds.

    Greedy and without chance: again and again the case with the most new pairs, the first of equal ones.
    """
    missing = set().union(*map(pairs, cases))
    held, chosen = [(case, pairs(case)) for case in cases], []
    while missing:
        best, shown = max(held, key=lambda one: len(one[1] & missing))
        chosen.append(best)
        missing -= shown
    return chosen

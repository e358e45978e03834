"""What is changed: the conventional ones of cosmic-ray's operators, and four that it lacks.

One counterpart for each arithmetic operator, and for comparisons the boundary and the opposite: cosmic-ray's others
(``a + b`` to ``a << b``) mostly end in a TypeError, which every test kills. Texts are not changed.
"""

import parso
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

CHOSEN = (
    *(f"ReplaceBinaryOperator_{x}" for x in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "LShift_RShift",
        "RShift_LShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitAnd",
    )),
    *(f"ReplaceComparisonOperator_{x}" for x in (
        "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_GtE", "LtE_Gt", "Gt_LtE", "GtE_Lt", "Eq_NotEq", "NotEq_Eq",
        "Is_IsNot", "IsNot_Is",
    )),
    *(f"ReplaceUnaryOperator_{x}" for x in ("USub_UAdd", "Delete_Invert", "Delete_Not")),
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator",
    "ZeroIterationForLoop",
)  # fmt: skip


class Ours(Operator):
    """An operator that changes a node as a whole, in one way."""

    def mutation_positions(self, node):
        if self.applies(node):
            yield node.start_pos, node.end_pos

    @classmethod
    def examples(cls):
        return ()


def leaf(code: str, node):
    """Code in a node's place, with what stood before it."""
    return parso.python.tree.Name(code, node.start_pos, prefix=node.get_first_leaf().prefix)


class RemoveStatement(Ours):
    """``pass`` for a statement within a function that assigns, calls, raises or asserts."""

    def applies(self, node) -> bool:
        kinds = ("expr_stmt", "atom_expr", "raise_stmt", "assert_stmt", "del_stmt", "return_stmt")
        inside = parso.python.tree.search_ancestor(node, "funcdef") is not None
        bare = node.type == "keyword" and node.value == "return"
        return inside and node.parent.type == "simple_stmt" and node.type in kinds and not bare

    def mutate(self, node, index):
        return leaf("pass", node)


class ReturnNone(Ours):
    def applies(self, node) -> bool:
        return node.type == "return_stmt" and node.children[1].get_code().strip() != "None"

    def mutate(self, node, index):
        return leaf("return None", node)


class SwapIn(Ours):
    """``in`` and ``not in`` of comparisons."""

    def applies(self, node) -> bool:
        return node.parent is not None and node.parent.type == "comparison" and self.text(node) in ("in", "not in")

    def mutate(self, node, index):
        return leaf("not in" if self.text(node) == "in" else "in", node)

    def text(self, node) -> str:
        return " ".join(node.get_code().split())


class NegateFilter(Ours):
    """The condition of a comprehension."""

    def applies(self, node) -> bool:
        return node.parent is not None and node.parent.type == "comp_if" and node is node.parent.children[1]

    def mutate(self, node, index):
        return leaf(f"not ({node.get_code().strip()})", node)


OPERATORS: dict[str, Operator] = {name: get_operator(f"core/{name}")() for name in CHOSEN}
OPERATORS |= {kind.__name__: kind() for kind in (RemoveStatement, ReturnNone, SwapIn, NegateFilter)}


def evaluated(node) -> bool:
    """False within annotations, which nothing evaluates here (every module has ``from __future__ import annotations``
    or annotations of fields, whose types are not looked at)."""
    while node.parent is not None:
        parent = node.parent
        if parent.type in ("annassign", "tfpdef") and node is parent.children[1 if parent.type == "annassign" else 2]:
            return False
        if parent.type == "funcdef" and node is parent.annotation:
            return False
        node = parent
    return True

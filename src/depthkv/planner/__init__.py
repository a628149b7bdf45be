"""Measurements and a budget in, a plan out."""

from depthkv.planner.exact import exact_plan
from depthkv.planner.explain import Planned, make_plan
from depthkv.planner.nested import nested_plans
from depthkv.planner.problem import Budget, Problem
from depthkv.planner.search import search
from depthkv.planner.swaps import cheapest_plan

__all__ = ["Budget", "Planned", "Problem", "cheapest_plan", "exact_plan", "make_plan", "nested_plans", "search"]

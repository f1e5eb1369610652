"""Scoring: what an answer says, whether it is right, and what a task's answers are worth together."""

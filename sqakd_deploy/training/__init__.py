"""Distillation of students, training of teachers, and what both go through."""

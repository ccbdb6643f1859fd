"""Shapes, parameter trees and the index of the prompt bank. Imports JAX alone."""

"""Encoders that are fitted to a catalogue, and fits that stores, runs and exports keep."""

"""Live knobs: what may change while a run goes on, through one audited command."""

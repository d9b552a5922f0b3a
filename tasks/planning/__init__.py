"""What a run would take on this machine: data counted, a probe measured, kept for the next plan."""

"""Foreign files in and out: HF checkpoints and PEFT adapters. HF's names stand only here."""

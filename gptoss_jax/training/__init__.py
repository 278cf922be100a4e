"""Fine-tuning: conversations in, a trained checkpoint or an adapter out; what is killed goes on bit for bit."""

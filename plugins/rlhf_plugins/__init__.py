"""Methods that ship with rlhf_core. Each is found through an entry point, exactly as a third party's is."""

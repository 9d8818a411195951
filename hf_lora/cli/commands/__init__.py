"""What each command does; imported when it is called: this brings torch and transformers."""

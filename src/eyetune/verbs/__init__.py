"""One story a verb; no verb imports another, `demo` and `search` aside."""

"""HTTP server of a guarded model: ``gazeguard serve``, in the forms of OpenAI's and LiteLLM's interfaces."""

"""One expert after the other in plain torch, as a backend outside moebench."""


class DemoBf16:
    name = "demo_bf16"
    act_dtype = "bf16"

    def unsupported(self, case, device):
        return "torch is not installed; pip install torch" if device.torch is None else None

    def prepare(self, layer, max_num_tokens):
        import torch

        from moebench.mx import dequantize_mxfp4

        w13, w2 = dequantize_mxfp4(layer.w13), dequantize_mxfp4(layer.w2)  # fp32 [E_local, 2 I, H], [E_local, H, I]
        experts_here = range(layer.num_local_experts)

        def experts(tokens):
            x = tokens.hidden_states.float()
            out = torch.zeros_like(x)
            for local in experts_here:
                chosen = tokens.topk_ids == layer.local_expert_start + local  # bool [M, top_k]
                weight = (tokens.topk_weights * chosen).sum(1, keepdim=True)  # fp32 [M, 1], 0 for tokens of other experts
                pre = x @ w13[local].T + (0 if layer.b13 is None else layer.b13[local].float())
                h = swiglu(pre[:, 0::2], pre[:, 1::2], layer.swiglu).bfloat16().float()  # what the second GEMM reads is bf16
                out += weight * (h @ w2[local].T + (0 if layer.b2 is None else layer.b2[local].float()))
            return out.bfloat16()

        return experts


def swiglu(gate, up, constants):
    if constants.limit is not None:
        gate, up = gate.clamp(max=constants.limit), up.clamp(-constants.limit, constants.limit)
    return gate * (constants.alpha * gate).sigmoid() * (up + constants.beta)


backend = DemoBf16()

// From nodes to programs: which kernel calls, in which order, on which buffers.
#include <utility>

#include "plan.h"

namespace spc {
namespace {

// A backward pass makes the gradients of trained parameters, with `asked` only the largest of the
// weights of nodes [asked]. `own`: batch norm by the batch's own statistics.
class Writer {
public:
    Writer(const spc_plan& plan, bool own, bool backward,
           const std::vector<char>* asked = nullptr)
        : plan_(plan), own_(own), backward_(backward), asked_(asked) {
        const std::size_t count = plan.nodes.size();
        value_.assign(count, -1);
        saved_.assign(count, -1);
        gradient_.assign(count, -1);
        wants_.assign(count, 0);
        readers_.assign(count, 0);
        last_reader_.assign(count, -1);
        kept_.assign(count, 0);
        precise_.assign(count, 0);
        half_.assign(count, -1);
        expanded_.assign(count, 0);
        for (int i = 0; i < static_cast<int>(count); ++i) study(i);
        if (backward_)
            for (int i = 0; i < static_cast<int>(count); ++i) keep(i);
    }

    // Nothing but the forward pass as far as node `last`.
    Program write_forward(int last) {
        forward_to(last);
        return std::move(program_);
    }

    Program write() {
        forward_to(plan_.output);
        program_.logits = value_[plan_.output];
        Step loss{Action::loss, plan_.output};
        loss.x = program_.logits;
        if (backward_) loss.dy = gradient_[plan_.output] = activation(plan_.output);
        emit(loss);
        if (backward_)
            for (int i = plan_.output; i > 0; --i) backward(i);
        return std::move(program_);
    }

private:
    const Node& node(int i) const { return plan_.nodes[static_cast<std::size_t>(i)]; }

    // The node whose result a node's result is another view of.
    int storage(int i) const {
        while (node(i).kind == Kind::flatten) i = node(i).source;
        return i;
    }

    static bool trains(const spc_parameter& p) { return p.values && p.gradient; }
    // Whether a node has parameters whose gradients are made.
    bool trains(int i) const {
        if (asked_) return (*asked_)[static_cast<std::size_t>(i)];
        const Node& n = node(i);
        if (n.kind == Kind::conv)
            return trains(n.conv_arrays.bias) || n.conv_arrays.weight.gradient;
        return n.kind == Kind::norm &&
               (trains(n.norm_arrays.gamma) || trains(n.norm_arrays.beta));
    }

    void study(int i) {
        const Node& n = node(i);
        wants_[i] = trains(i) || (n.source >= 0 && wants_[n.source]) ||
                    (n.other >= 0 && wants_[n.other]);
        if (n.kind == Kind::flatten) return;
        for (int read : {n.source, n.other}) {
            if (read < 0) continue;
            ++readers_[storage(read)];
            last_reader_[storage(read)] = i;
        }
    }

    // Whether the input of a batch norm is computed again instead of kept.
    bool recomputed(int norm) const {
        const int source = node(norm).source;
        return plan_.recompute && node(source).kind == Kind::conv && readers_[source] == 1 &&
               source != plan_.output;
    }

    // Marks what the backward pass of a node reads.
    void keep(int i) {
        const Node& n = node(i);
        if (!wants_[i]) return;
        if (n.kind == Kind::relu || (n.kind == Kind::norm && n.relu)) kept_[i] = 1;
        if (n.kind == Kind::conv && trains(i)) kept_[storage(n.source)] = 1;
        if (n.kind == Kind::norm && recomputed(i)) {
            kept_[storage(node(n.source).source)] = 1;
        } else if (n.kind == Kind::norm) {
            kept_[storage(n.source)] = precise_[storage(n.source)] = 1;
        }
    }

    // Whether node i may write its result over the result of `source`.
    bool overwrites(int i, int source) const {
        const int s = storage(source);
        return last_reader_[s] == i && node(i).source != node(i).other && !kept_[s];
    }

    int buffer(std::size_t sample_bytes, std::size_t fixed_bytes = 0) {
        program_.buffers.push_back({sample_bytes, fixed_bytes});
        return static_cast<int>(program_.buffers.size()) - 1;
    }

    int activation(int i) {
        return buffer(sizeof(float) * static_cast<std::size_t>(node(i).size()));
    }

    void emit(const Step& step) {
        const int index = static_cast<int>(program_.steps.size());
        program_.steps.push_back(step);
        int operands[kOperands];
        step.operands(operands);
        for (int operand : operands) {
            if (operand < 0) continue;
            Buffer& b = program_.buffers[static_cast<std::size_t>(operand)];
            if (b.first < 0) b.first = index;
            b.last = index;
        }
    }

    void forward_to(int last) {
        for (int i = 0; i <= last; ++i) {
            forward(i);
            compress_after(i);
        }
    }

    void forward(int i) {
        const Node& n = node(i);
        if (n.kind == Kind::flatten) {
            value_[i] = value_[n.source];
            return;
        }
        Step step{forward_action(n), i};
        step.x = n.source < 0 ? -1 : value_[n.source];
        step.residual = n.other < 0 ? -1 : value_[n.other];
        const bool elementwise =
            n.kind == Kind::norm || n.kind == Kind::relu || n.kind == Kind::add;
        if (elementwise && overwrites(i, n.source)) {
            step.y = step.x;
        } else if (elementwise && n.other >= 0 && overwrites(i, n.other)) {
            step.y = step.residual;
        } else {
            step.y = activation(i);
        }
        if (step.action == Action::norm_train) {
            saved_[i] = buffer(0, 2 * sizeof(float) * static_cast<std::size_t>(n.channels));
        } else if (n.kind == Kind::max_pool && backward_ && wants_[i]) {
            saved_[i] = buffer(static_cast<std::size_t>(n.size()));
        }
        step.saved = saved_[i];
        value_[i] = step.y;
        emit(step);
    }

    Action forward_action(const Node& n) const {
        switch (n.kind) {
            case Kind::input: return Action::load;
            case Kind::conv: return Action::conv;
            case Kind::norm:
                // Without running statistics the batch's own serve in inference too.
                return own_ || !n.norm_arrays.running_mean ? Action::norm_train
                                                           : Action::norm_infer;
            case Kind::relu: return Action::relu;
            case Kind::add: return Action::add;
            case Kind::max_pool: return Action::max_pool;
            case Kind::avg_pool: return Action::avg_pool;
            default: return Action::global_pool;
        }
    }

    // Whether a result is kept to the backward pass in half the bytes. Not what batch norm reads:
    // small deviations from a large mean would be lost.
    bool compressed(int s) const {
        return plan_.bfloat16 && kept_[s] && !precise_[s] && node(s).kind != Kind::conv &&
               node(s).kind != Kind::input;
    }

    // Compresses results that no forward step reads after node i's.
    void compress_after(int i) {
        const Node& n = node(i);
        if (n.kind == Kind::flatten) return;
        for (int read : {n.source, n.other}) {
            if (read < 0) continue;
            const int s = storage(read);
            if (!compressed(s) || last_reader_[s] != i || half_[s] >= 0) continue;
            Step step{Action::compress, s};
            step.x = value_[s];
            step.y = half_[s] = buffer(2 * static_cast<std::size_t>(node(s).size()));
            emit(step);
        }
    }

    // The result of a node for a backward step.
    int kept_value(int i) {
        const int s = storage(i);
        if (half_[s] < 0) return value_[s];
        if (!expanded_[s]) {
            Step step{Action::expand, s, true};
            step.x = half_[s];
            step.y = value_[s] = activation(s);
            emit(step);
            expanded_[s] = 1;
        }
        return value_[s];
    }

    Step backward_step(Action action, int i) const {
        Step step{action, i, true};
        step.dy = gradient_[i];
        return step;
    }

    // The gradient of a node's result is complete: all its readers come later.
    void backward(int i) {
        const Node& n = node(i);
        if (gradient_[i] < 0 || !wants_[i]) return;
        switch (n.kind) {
            case Kind::input: return;
            case Kind::conv: return backward_conv(i);
            case Kind::norm: return backward_norm(i);
            case Kind::add: return backward_add(i);
            case Kind::flatten: return give(n.source, gradient_[i]);
            case Kind::relu: {
                Step step = backward_step(Action::relu_grad, i);
                step.y = kept_value(i);
                step.dx = step.dy;
                emit(step);
                return give(n.source, step.dx);
            }
            case Kind::max_pool: return backward_pool(Action::max_pool_grad, i);
            case Kind::avg_pool: return backward_pool(Action::avg_pool_grad, i);
            case Kind::global_pool: return backward_pool(Action::global_pool_grad, i);
        }
    }

    void backward_conv(int i) {
        const Node& n = node(i);
        const bool passes = wants_[n.source];
        // Both gradients in one pass where both are wanted.
        const bool both = passes && !asked_ && n.conv_arrays.weight.gradient;
        Step step = backward_step(both ? Action::conv_grads : Action::input_grad, i);
        if (both) step.x = kept_value(n.source);
        if (trains(i) && !both) {
            Step own = backward_step(asked_ ? Action::topk_grad : Action::weight_grad, i);
            own.x = kept_value(n.source);
            emit(own);
        }
        if (!passes) return;
        step.dx = activation(n.source);
        emit(step);
        give(n.source, step.dx);
    }

    void backward_norm(int i) {
        const Node& n = node(i);
        Step step = backward_step(Action::norm_grad, i);
        if (n.relu) step.y = kept_value(i);  // first: its compressed form is then done with
        if (!recomputed(i)) {
            step.x = kept_value(n.source);
        } else {
            Step again{Action::conv, n.source, true};
            again.x = kept_value(node(n.source).source);
            again.y = step.x = activation(n.source);
            emit(again);
        }
        step.saved = saved_[i];
        const bool passes = n.other >= 0 && wants_[n.other];
        // Without ReLU the residual's gradient is dy as it is; then dx needs a place of its own.
        if (passes && n.relu) step.dresidual = activation(i);
        step.dx = passes && !n.relu ? activation(i) : step.dy;
        emit(step);
        give(n.source, step.dx);
        if (passes) give(n.other, n.relu ? step.dresidual : step.dy);
    }

    void backward_add(int i) {
        const Node& n = node(i);
        const bool both = wants_[n.source] && wants_[n.other];
        int second = gradient_[i];
        // The left side takes the buffer over, unless it only adds it to its own.
        if (both && gradient_[n.source] < 0) {
            Step copy = backward_step(Action::copy, i);
            copy.dx = second = activation(i);
            emit(copy);
        }
        give(n.source, gradient_[i]);
        give(n.other, second);
    }

    void backward_pool(Action action, int i) {
        const int source = node(i).source;
        if (!wants_[source]) return;
        Step step = backward_step(action, i);
        step.saved = saved_[i];
        step.dx = activation(source);
        emit(step);
        give(source, step.dx);
    }

    // A reader's contribution to the gradient of a node's result.
    void give(int i, int contribution) {
        if (!wants_[i]) return;
        int& gradient = gradient_[i];
        if (gradient < 0) {
            gradient = contribution;
            return;
        }
        Step step{Action::accumulate, i, true};
        step.x = contribution;
        step.dx = gradient;
        emit(step);
    }

    const spc_plan& plan_;
    const bool own_, backward_;
    const std::vector<char>* asked_;
    Program program_;
    // By node: buffer of the result, of what its backward pass needs besides, and of the
    // result's gradient; whether that gradient is wanted.
    std::vector<int> value_, saved_, gradient_;
    std::vector<char> wants_;
    // By storage: how many nodes read it, the last of them, whether the backward pass does and
    // needs it whole.
    std::vector<int> readers_, last_reader_;
    std::vector<char> kept_, precise_;
    // By storage: buffer of the compressed result, and whether the backward pass has expanded it.
    std::vector<int> half_;
    std::vector<char> expanded_;
};

}  // namespace

Program training_program(const spc_plan& plan) { return Writer(plan, true, true).write(); }

Program inference_program(const spc_plan& plan) { return Writer(plan, false, false).write(); }

Program growth_program(const spc_plan& plan, const std::vector<char>& asked) {
    return Writer(plan, true, true, &asked).write();
}

Program statistics_program(const spc_plan& plan, int last) {
    return Writer(plan, true, false).write_forward(last);
}

}  // namespace spc

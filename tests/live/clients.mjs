// OpenAI's clients for Node in an agent's loop against a running server: `node clients.mjs URL MODEL` prints one JSON
// document, what was called and said by each client, through each API, whole and streamed.
import { Agent, OpenAIProvider, Runner, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const fn = { name: "get_weather", description: "Gives the weather in a city.", parameters };
const question = { role: "user", content: "What is it like in Paris?" };
const weather = { Paris: "rain" };

async function chatLoop(stream) {
  const messages = [question], said = [];
  for (let turn = 0; turn < 4; turn++) {
    const asked = { model, messages, tools: [{ type: "function", function: fn }] };
    const message = stream
      ? await client.chat.completions.stream(asked).finalMessage()
      : (await client.chat.completions.create(asked)).choices[0].message;
    messages.push(message);
    if (!message.tool_calls?.length) return [...said, message.content];
    for (const call of message.tool_calls) {
      said.push(call.function.name + call.function.arguments);
      messages.push({ role: "tool", tool_call_id: call.id, content: weather[JSON.parse(call.function.arguments).city] });
    }
  }
  return said;
}

async function responsesLoop(stream) {
  let input = [question], previous = undefined;
  const said = [];
  for (let turn = 0; turn < 4; turn++) {
    const asked = { model, input, tools: [{ type: "function", strict: false, ...fn }], previous_response_id: previous };
    const response = stream
      ? await client.responses.stream(asked).finalResponse()
      : await client.responses.create(asked);
    const calls = response.output.filter((item) => item.type === "function_call");
    if (!calls.length) return [...said, response.output_text];
    said.push(...calls.map((call) => call.name + call.arguments));
    previous = response.id;
    input = calls.map((call) => ({
      type: "function_call_output", call_id: call.call_id, output: weather[JSON.parse(call.arguments).city],
    }));
  }
  return said;
}

async function agentLoop(useResponses, stream) {
  const said = [];
  const getWeather = tool({
    name: fn.name,
    description: fn.description,
    parameters: z.object({ city: z.string() }), // which makes the function a strict one
    execute: async ({ city }) => {
      said.push(fn.name + JSON.stringify({ city }));
      return weather[city];
    },
  });
  const agent = new Agent({ name: "guide", instructions: "Be brief.", model, tools: [getWeather] });
  const runner = new Runner({ modelProvider: new OpenAIProvider({ openAIClient: client, useResponses }) });
  const result = await runner.run(agent, question.content, { stream, maxTurns: 4 });
  if (stream) await result.completed;
  return [...said, result.finalOutput];
}

setTracingDisabled(true);
const found = {};
for (const stream of [false, true]) {
  const how = stream ? ", streamed" : "";
  found[`openai, chat${how}`] = await chatLoop(stream);
  found[`openai, responses${how}`] = await responsesLoop(stream);
  found[`agents, chat${how}`] = await agentLoop(false, stream);
  found[`agents, responses${how}`] = await agentLoop(true, stream);
}
console.log(JSON.stringify(found));
